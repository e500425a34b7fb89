"""`flash compare`: what two runs differ in, in their configs, their curves and their scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.evaluation_view import show_difference
from flash.cli.output import note, out, print_json, table, warn
from flash.cli.progress import sparkline, thin
from flash.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from flash.plane.plane import Plane
    from flash.values import Event

JSON_KEYS: Final = {
    "a": "the first, by its id",
    "b": "the second",
    "config": "what they were started with where that differs: `path`, `a` and `b`; empty for two "
    "evaluations",
    "metrics": "`[step, value]` of every logged step by metric, under `a` and `b`",
    "held_out": "the same of the numbers that training measured on held-out rows",
    "evaluations": "the newest kept evaluations of the two that can be compared, drawn alike where "
    "any are: ids `a` and `b`, and `difference` as `flash eval --against` has it; or null",
    "incomparable": "why there are none, or null",
}

Curve = dict[int, float]
_SPARKLINE_WIDTH = 16
_DIGEST_SHOWN = len("sha256:") + 12
_NOT_CURVES = frozenset({"step", "total", "eta_s", "best"})


@attrs.frozen
class _Side:
    """One run as it is compared: `step` is a checkpoint's, None for the final adapter."""

    run: str
    step: int | None
    job: Mapping[str, Any]
    metrics: dict[str, Curve]
    held_out: dict[str, Curve]

    @property
    def name(self) -> str:
        return self.run if self.step is None else f"{self.run}/step-{self.step}"


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every point of the curves.")
@pass_app
def compare(app: App, a: str, b: str, *, as_json: bool) -> None:
    """
    Show what B has in another way than A, and whether it is better.

    Of two runs: the settings that differ, the curves of their metrics on one scale, and how much B
    gained over A in the newest evaluations that are kept of both. A checkpoint (`RUN/step-50`)
    stands for its run with the evaluations of that step. A and B may also be two evaluations.
    """
    from flash.evaluations import EvaluationStore, is_evaluation

    store = EvaluationStore(app.home)
    if is_evaluation(a) != is_evaluation(b):
        raise UsageError(
            f"{a} and {b} are a run and an evaluation", hint="give two runs, or two evaluations"
        )
    if is_evaluation(a):
        evaluations = [[store.find(a)], [store.find(b)]]
        found = {"a": evaluations[0][0]["evaluation"], "b": evaluations[1][0]["evaluation"]}
        found |= {"config": [], "metrics": {}, "held_out": {}}
    else:
        from flash.plane.plane import Plane

        plane = Plane(app.home)
        sides = [_side(plane, text) for text in (a, b)]
        evaluations = [
            [one for one in store.of_run(side.run) if one["step"] == side.step] for side in sides
        ]
        found = _of_runs(*sides)
    pair, reason = _difference(*evaluations)
    if as_json:
        shown = pair and {
            "a": pair[0]["evaluation"],
            "b": pair[1]["evaluation"],
            "difference": pair[2],
        }
        print_json(found | {"evaluations": shown, "incomparable": reason})
        return
    _show_config(found)
    _show_curves(found, "metrics")
    _show_curves(found, "held_out")
    if pair:
        out(f"{found['b']} on the {pair[1]['split'] or 'suites'} rows of {pair[1]['environment']}:")
        show_difference(pair[0], pair[2])
    elif evaluations[0] and evaluations[1]:
        warn(f"their evaluations cannot be compared: {reason}", hint=_hint(found))
    else:
        note(f"{reason}; {_hint(found)}")


def _hint(found: Mapping[str, Any]) -> str:
    return f"flash eval {found['b']} --against {found['a']} evaluates both on the same rows"


def _side(plane: Plane, text: str) -> _Side:
    from flash.plane.store import RunStore

    reference, _, checkpoint = text.partition("/")
    run = plane.find(reference).id
    return _Side(
        run=run,
        step=plane.saved(text).step if checkpoint else None,
        job=RunStore(plane.store(run)).job(),
        metrics=_curves(plane.events(run), "metric"),
        held_out=_curves(plane.events(run), "evaluation"),
    )


def _curves(events: Iterable[tuple[int, Event]], kind: str) -> dict[str, Curve]:
    """Return the numbers of events by name and step; what a later attempt repeats counts."""
    curves: dict[str, Curve] = {}
    for _, event in events:
        if event.type != kind:
            continue
        for name, value in event.data.items():
            if name not in _NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                curve = curves.setdefault(name, {})
                curve[event.data["step"]] = value
                thin(curve)
    return curves


def _of_runs(a: _Side, b: _Side) -> dict[str, Any]:
    return {
        "a": a.name,
        "b": b.name,
        "config": list(_config_difference(a.job, b.job)),
        **{
            kind: {
                name: {
                    side: [[step, value] for step, value in sorted(curves.get(name, {}).items())]
                    for side, curves in (("a", one), ("b", other))
                }
                for name in sorted(one.keys() | other.keys())
            }
            for kind, one, other in (
                ("metrics", a.metrics, b.metrics),
                ("held_out", a.held_out, b.held_out),
            )
        },
    }


def _config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    one, other = (dict(_settings(job)) for job in (a, b))
    for path in sorted(one.keys() | other.keys()):
        if one.get(path) != other.get(path):
            yield {"path": path, "a": one.get(path), "b": other.get(path)}


def _settings(job: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every setting of the spec by its dotted path, and what else decides a run."""
    yield from _flat(job["spec"])
    yield "environment (digest)", job["environment"]["digest"]
    yield "flash (version)", job["flash"]
    for name, plugin in job["plugins"].items():
        yield f"{name} (version)", plugin["version"]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _difference(
    of_a: Sequence[dict[str, Any]], of_b: Sequence[dict[str, Any]]
) -> tuple[tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None, str | None]:
    """
    Return two evaluations that can be compared with what B gained, or why there are none.

    The newest two that were drawn with the same settings, else the newest two.
    """
    from flash import comparison

    pairs = [(before, after) for after in of_b for before in of_a]
    if not pairs:
        return None, "there are no evaluations of both"
    fitting = [pair for pair in pairs if comparison.incomparable(*pair) is None]
    if not fitting:
        return None, comparison.incomparable(*pairs[0])
    before, after = next((pair for pair in fitting if comparison.drawn_alike(*pair)), fitting[0])
    return (before, after, comparison.compare(before, after)), None


def _show_config(found: Mapping[str, Any]) -> None:
    if not found["config"] and found["metrics"]:
        note("no setting differs")
    if found["config"]:
        table(
            ("setting", found["a"], found["b"]),
            [(one["path"], _cell(one["a"]), _cell(one["b"])) for one in found["config"]],
        )
        out()


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text[:_DIGEST_SHOWN] if text.startswith("sha256:") else text


def _show_curves(found: Mapping[str, Any], kind: str) -> None:
    rows = []
    for name, curves in found[kind].items():
        values = {side: [value for _, value in curves[side]] for side in ("a", "b")}
        every = [*values["a"], *values["b"]]
        bounds = (min(every), max(every))
        cells = [
            cell
            for side in ("a", "b")
            for cell in (
                sparkline(values[side], _SPARKLINE_WIDTH, bounds),
                f"{values[side][-1]:.4g}" if values[side] else None,
            )
        ]
        rows.append((name, *cells))
    if rows:
        title = "metric" if kind == "metrics" else "held out"
        table((title, found["a"], "last", found["b"], "last "), rows, right=("last", "last "))
        out()
