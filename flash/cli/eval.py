"""`flash eval`: the score of a run, a checkpoint or a model on rows it was not trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from flash.cli.app import App, pass_app
from flash.cli.evaluation_view import (
    complain,
    refuse_without_scores,
    show_difference,
    show_evaluation,
)
from flash.cli.output import note, out, print_json, warn
from flash.errors import FlashError, StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.cli.targets import Target

_FROM_KEPT = ("split", "samples", "temperature", "seed", "max_tokens")

JSON_KEYS: Final = {
    "evaluation": "the id under which it is kept, or null where that failed",
    "created_s": "when it ended, in seconds since 1970",
    "flash": "the version that made it",
    "format": "of the file that keeps it",
    "target": "TARGET as it was given",
    "run": "the run's id, or null",
    "step": "of the checkpoint, or null",
    "model": "the base model, or the model's name at its server",
    "endpoint": "the server's address, or null",
    "environment": "as the run or --environment calls it",
    "params": "`[environment.params]` that it was loaded with",
    "reward": "the `[reward.*]` tables that its score is of",
    "thinking": "whether the prompts were in the reasoning mode; null where a server decides",
    "n": "rows with a scored answer",
    "mean": "of their scores, or null where there are none",
    "mean_interval": "its 95 % interval, or null where all scores are equal",
    "success": "the share of answers that succeeded, each row counting alike, or null",
    "interval": "its 95 % interval, or null",
    "pass_at": "pass@k by k; empty for one answer a row",
    "metrics": "the named metrics of environment and reward adapters, each the mean over its rows",
    "errors": "answers that could not be scored, and are in none of the numbers above",
    "truncated": "answers that were cut at `max_tokens`",
    "rows": "every answer, by row",
    "suites": "the same from `n` to `rows` of each suite of the environment, by name",
    "split": "where the rows are from; null where there are only suites",
    "samples": "answers to each row",
    "temperature": "they were drawn at; 0 is greedy",
    "seed": "of the draws",
    "max_tokens": "the most tokens of one turn",
    "tokens": "tokens that were generated",
    "tokens_per_s": "how fast, or null",
    "seconds": "how long it took, loading included",
    "digest": "of the environment's files",
    "adapter": "digest of the adapter's files, or null",
    "against": "with --against: the other evaluation, and `difference`; else null",
}

ROW_KEYS: Final = {
    "row": "which one it is, from 0",
    "sample": "which of its answers, from 0",
    "id": "of the task",
    "input": "of the task",
    "completion": "what the model said, or null",
    "truncated": "whether that was cut",
    "score": "or null where the answer could not be scored",
    "success": "whether the environment counts it as one",
    "metrics": "the named metrics",
    "reason": "the environment's word on the score, or null",
    "error": "why it could not be scored, or null",
}

DIFFERENCE_KEYS: Final = {
    "verdict": "`better`, `worse` or `no change beyond noise`; null where no row is in both",
    "n": "rows that both have scored",
    "mean": "of the scores: `before`, `after`, `gain`, its 95 % interval from `low` to `high` "
    "(null where so few rows say nothing), and a `verdict` of its own",
    "success": "the same of the success rate",
    "metrics": "`[before, after]` of each named metric",
    "up": "rows with a higher score than before",
    "same": "rows with the same score",
    "down": "rows with a lower score",
    "left_out": "rows that only one of the two has scored",
    "suites": "the same of each suite that both ran, by name",
    "notes": "what else they differ in",
}


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity, which a range lets through."""
    if value is not None and not math.isfinite(value):
        message = f"{value} is not a finite number."
        raise click.BadParameter(message)
    return value


@click.command("eval")
@click.argument("target")
@click.option(
    "--environment",
    "reference",
    metavar="REF",
    help="Score on this environment: a folder, or a config whose [environment] and [reward.*] "
    "count; default: the one the run was trained on, as it was then.",
)
@click.option("--split", help="Rows to score; default: the first split that is not trained on.")
@click.option("-n", "rows", type=click.IntRange(min=1), help="Score only the first so many rows.")
@click.option(
    "--samples",
    type=click.IntRange(min=1, max=1024),
    help="Answers to each row, for pass@k; default: 1.",
)
@click.option(
    "--against",
    metavar="OTHER",
    help="Evaluate OTHER on the same rows, and say whether TARGET is better. A target like it, or "
    "a kept evaluation.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of one turn; default: twice the longest gold answer, or 512.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Default: 0, which is greedy; for several answers what the run sampled at in training, "
    "or 1.",
)
@click.option("--seed", type=int, help="Of the draws above temperature 0; default: 0.")
@click.option(
    "--key-from",
    metavar="NAME",
    help="The secret that holds a server's key; default: OPENAI_API_KEY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every answer included.")
@pass_app
def eval_(
    app: App,
    /,
    target: str,
    reference: str | None,
    against: str | None,
    key_from: str | None,
    *,
    as_json: bool,
    **settings: Any,
) -> None:
    """
    Score TARGET on held-out rows, and keep the result.

    TARGET is a run, a checkpoint (`RUN/step-50`), a base model, or a model behind an
    OpenAI-compatible server (`https://HOST/v1#MODEL`). What is no run needs --environment, or a run
    after --against. Reports the success rate and the mean score, each with its 95 % interval, and
    runs the environment's own suites too. `flash eval list` lists what is kept.
    """
    from flash.cli.targets import find_target

    found = find_target(app, target)
    kept, other = _other(app, against)
    evaluator = _Evaluator.of(app, reference, [found, other], key_from)
    evaluator.refuse_without_rewards()
    if kept:
        evaluator.check(kept, settings["split"])
    asked = _settings(settings, found, kept)
    # A model that was not trained here is asked as the one it is compared with.
    asked["thinking"] = _first(
        found.thinking,
        other and other.thinking,
        kept and kept["thinking"],
        evaluator.thinking,
        default=False,
    )
    result = evaluator.evaluate(found, asked)
    difference = None
    if other:
        same = {name: result[name] for name in ("split", "max_tokens")}
        asked |= same | {"thinking": _first(other.thinking, asked["thinking"])}
        kept_as = f"kept as {result['evaluation']}; " if result["evaluation"] else ""
        note(f"{kept_as}evaluating {against}")
        kept = evaluator.evaluate(other, asked)
    if kept:
        difference = _difference(kept, result)
    if as_json:
        print_json(result | {"against": kept and {**kept, "difference": difference}})
    else:
        show_evaluation(result)
    complain(result)
    if kept and difference and not as_json:
        out()
        show_difference(kept, difference)


def _first(*values: Any, default: Any = None) -> Any:
    """Return the first value that is set."""
    return next((value for value in values if value is not None), default)


def _other(app: App, against: str | None) -> tuple[dict[str, Any] | None, Target | None]:
    """Return the kept evaluation, or the target, that --against names."""
    from flash.cli.targets import find_target
    from flash.evaluations import EvaluationStore, is_evaluation

    if against is None:
        return None, None
    if is_evaluation(against):
        return EvaluationStore(app.home).find(against), None
    return None, find_target(app, against)


def _settings(
    given: Mapping[str, Any], target: Target, kept: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what decides how answers are drawn: as given, as in the kept one, by default."""
    settings = {**given}
    for name in _FROM_KEPT:
        settings[name] = _first(given[name], kept and kept[name])
    samples = _first(settings["samples"], default=1)
    usual = 0.0 if samples == 1 else _first(target.temperature, default=1.0)
    temperature = _first(settings["temperature"], default=usual)
    if samples > 1 and temperature == 0:
        raise UsageError(
            f"greedy answers to one row are all alike: {samples} of them say no more than one",
            hint="--temperature 1, or leave --samples out",
        )
    seed = _first(settings["seed"], default=0)
    return settings | {"samples": samples, "temperature": temperature, "seed": seed}


@attrs.frozen
class _Evaluator:
    """Evaluates models on one environment and keeps what it finds."""

    app: App
    environment: Mapping[str, Any]
    reference: str
    key_from: str | None
    base: Path
    thinking: bool | None = None

    @classmethod
    def of(
        cls, app: App, reference: str | None, targets: list[Target | None], key_from: str | None
    ) -> _Evaluator:
        """Return the one for --environment, or else for the environment of the first run."""
        from flash.cli.place import find_place
        from flash.cli.targets import wrong_key_name

        if key_from and (wrong := wrong_key_name(key_from)):
            raise UsageError(f"--key-from {wrong}")
        runs = [target for target in targets if target]
        known = [(run.environment, run.reference) for run in runs if run.environment]
        if reference:
            place = find_place(app, reference)
            environment = place.request(known[0][0]["env"] if known else {})
            thinking = place.spec.thinking if place.spec else None
            return cls(app, environment, reference, key_from, place.base, thinking)
        if not known:
            raise UsageError(
                f"{runs[0].text} is {runs[0].kind}, so its rows are not known",
                hint="name an environment, or a config with one: --environment FOLDER",
            )
        return cls(app, *known[0], key_from, Path.cwd())

    def refuse_without_rewards(self) -> None:
        """Refuse an environment that cannot score, before answers that may cost are drawn."""
        from flash.rewards import adapters_of

        scores = self.app.host.get("environment", self.environment["plugin"]).scores
        if not scores and not adapters_of(self.environment["reward"]):
            raise UsageError(
                f"nothing scores {self.reference}: it has no score of its own, and no reward table",
                hint="write [reward.*] tables into a config, and name that: "
                "--environment CONFIG.toml",
            )

    def check(self, kept: Mapping[str, Any], split: str | None) -> None:
        """Refuse a kept evaluation that nothing found here can be compared with."""
        from flash.comparison import incomparable
        from flash.environments import folder_digest

        here = {
            "digest": folder_digest(Path(self.environment["folder"])),
            "params": self.environment["params"],
            "reward": self.environment["reward"],
            "split": _first(split, kept["split"]),
        }
        if reason := incomparable(kept, here):
            message = f"there is nothing to compare {kept['evaluation']} with: {reason}"
            raise UsageError(message, hint="give the other's target: it is evaluated anew")

    def evaluate(self, target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the evaluation as it is kept; raises `FlashError` where no row was scored."""
        from flash import foreground
        from flash.cli.targets import DEFAULT_KEY, secrets_for

        endpoint = target.endpoint
        found = foreground.call(
            "evaluate",
            {
                "model": target.model,
                "endpoint": endpoint
                and {
                    "url": endpoint.url,
                    "model": endpoint.model,
                    "key": self.key_from or DEFAULT_KEY,
                },
                "adapter": str(target.adapter) if target.adapter else None,
                "environment": self.environment,
                "settings": settings,
            },
            home=self.app.home,
            secrets=secrets_for(self.app, target, self.environment, self.base, self.key_from),
            progress=note,
        )
        served = found.pop("served")
        evaluation = {
            "target": target.text,
            "run": target.run,
            "step": target.step,
            "model": served or (target.model and target.model["id"]),
            "endpoint": endpoint and endpoint.url,
            "environment": self.reference,
            "params": self.environment["params"],
            "reward": self.environment["reward"],
            "thinking": None if endpoint else settings["thinking"],
            **found,
        }
        refuse_without_scores(evaluation)
        return self._keep(evaluation)

    def _keep(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """Keep it; where that fails, what was found is not lost on the user yet."""
        from flash.evaluations import EvaluationStore

        try:
            return EvaluationStore(self.app.home).keep(evaluation)
        except StoreError as error:
            warn(f"the evaluation is not kept: {error.message}", hint=error.hint)
            unkept = dict.fromkeys(("evaluation", "created_s", "flash", "format"))
            return {**unkept, **evaluation}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    from flash.comparison import compare, incomparable

    if reason := incomparable(before, after):
        raise FlashError(f"{before['target']} and {after['target']} cannot be compared: {reason}")
    return compare(before, after)
