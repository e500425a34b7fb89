"""Whatever goes in: a spec comes back the same, and wrong input never raises anything of ours."""

import contextlib
import datetime as dt
import json

import attrs
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash.errors import SpecError, StoreError
from flash.job import Job
from flash.spec import resolve, spec_from_dict, spec_to_dict, spec_to_toml
from flash.spec.layers import clean
from flash.values import Problem

ANY_EXAMPLES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
WORDS = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
NAMES = st.from_regex(r"[A-M]{1,5}_[N-Z]{1,4}", fullmatch=True).filter(lambda n: "KEY" not in n)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
VALUES = st.recursive(
    st.booleans() | INTEGERS | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.just(object()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
    ),
    max_leaves=10,
)


def table(**entries):
    """Return tables with any subset of the entries."""
    return st.fixed_dictionaries({}, optional=entries)


TRAIN = table(
    lora_rank=st.integers(1, 256),
    learning_rate=st.floats(1e-9, 1.0),
    batch_size=st.integers(1, 512) | st.integers(1, 512).map(float),
    max_length=st.integers(8, 2**40),
    epochs=st.floats(0.01, 100) | st.integers(1, 9),
    save_at_steps=st.lists(st.integers(0, 10**9), max_size=4),
    init_from_adapter=WORDS,
    target_modules=WORDS | st.lists(WORDS, max_size=3),
    warmup=table(share=st.floats(0, 1), shape=st.sampled_from(["linear", "cosine"])),
)
CONFIGS = st.fixed_dictionaries(
    {
        "model": TEXT.filter(bool),
        "environment": st.one_of(
            *(
                st.fixed_dictionaries(
                    {place: TEXT.filter(bool)},
                    optional={
                        "params": st.dictionaries(TEXT, VALUES, max_size=3),
                        "pip": st.lists(st.sampled_from(["numpy>=2", "a-b[c]==1"]), max_size=2),
                        "secrets": st.lists(NAMES, max_size=3),
                        "split": WORDS,
                    },
                )
                for place in ("id", "path")
            )
        ),
    },
    optional={
        "thinking": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
        "train": TRAIN,
        "worker_env": st.dictionaries(NAMES, WORDS, max_size=3),
        "budget": table(max_hours=st.floats(0.001, 1000)),
        "provider": table(local=table(region=WORDS), cloud=table()),
        "reward": table(
            judge=table(region=WORDS, weight=st.floats(-5, -0.1)),
            environment=table(weight=st.floats(0.1, 5)),
        ),
        "sink": table(wandb=table(project=WORDS, run_name=WORDS)),
    },
)


ODD_ENTRIES = st.dictionaries(
    st.sampled_from(["model", "seed", "params", "pip", "lora_rank", "warmup", "sink"])
    | st.text(max_size=5),
    ANYTHING,
    max_size=3,
)


@pytest.fixture
def config(tmp_path):
    return tmp_path / "run.toml"


def resolved(config, content, host, **more):
    config.write_bytes(content)
    answer = resolve(config, host=host, **more)
    assert all(isinstance(problem, Problem) for problem in answer.problems)
    wrong = any(problem.severity == "error" for problem in answer.problems)
    assert wrong is (answer.spec is None)
    for problem in answer.problems:
        str(problem).encode()
    return answer


@ANY_EXAMPLES
@given(data=CONFIGS)
def test_a_resolved_spec_comes_back_from_toml_and_from_json(data, config, host):
    first = resolved(config, tomli_w.dumps(data).encode(), host)
    assert first.spec is not None, first.problems

    again = resolved(config, spec_to_toml(first.spec).encode(), host)

    assert again.spec == first.spec
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(first.spec))), host) == first.spec
    assert spec_from_dict(spec_to_dict(first.spec), host) == first.spec


@ANY_EXAMPLES
@given(data=CONFIGS)
def test_every_value_of_a_resolved_spec_has_a_source(data, config, host):
    answer = resolved(config, tomli_w.dumps(data).encode(), host)

    def paths(value, path):
        if attrs.has(type(value)):
            value = attrs.asdict(value, recurse=False)
        if isinstance(value, dict) and value:
            return [p for key, item in value.items() for p in paths(item, [*path, key])]
        return [path]

    known = answer.sources
    assert len(known) == len(paths(answer.spec, []))
    assert known["model"] == "run.toml"
    assert {known[f"train.{name}"] for name in data.get("train", {}) if name != "warmup"} <= {
        "run.toml"
    }


@ANY_EXAMPLES
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_a_spec_or_problems(content, config, host):
    resolved(config, content, host)


@ANY_EXAMPLES
@given(
    data=st.dictionaries(
        st.sampled_from(["model", "algorithm", "seed", "environment", "train", "sink", "wandb"])
        | TEXT,
        VALUES
        | st.dictionaries(
            st.sampled_from(["id", "path", "pip", "secrets", "lora_rank", "wandb", "warmup"]),
            VALUES | st.datetimes() | st.just(float("nan")),
            max_size=4,
        ),
        max_size=6,
    )
)
def test_any_toml_is_a_spec_or_problems(data, config, host):
    resolved(config, tomli_w.dumps(data).encode(), host)


@ANY_EXAMPLES
@given(
    sets=st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(["model", "train", "train.lora_rank", "environment.params.a.b", "x"])
            | st.text(max_size=6),
            st.text(max_size=12)
            | st.sampled_from(["[", "{", "nan", "9" * 5000, "2020-01-01", '"']),
        )
        | st.text(st.characters(), max_size=12),
        max_size=3,
    )
)
def test_any_set_is_a_value_or_a_problem(sets, config, host):
    resolved(config, b'model = "org/tiny"\nenvironment.path = "."\n', host, sets=sets)


@ANY_EXAMPLES
@given(data=ANYTHING)
def test_any_data_is_a_spec_or_a_spec_error(data, host):
    with contextlib.suppress(SpecError):
        spec_from_dict(data, host)


@ANY_EXAMPLES
@given(data=CONFIGS, where=st.sampled_from(["", "environment", "train"]), odd=ODD_ENTRIES)
def test_a_foreign_value_in_good_data_fits_or_is_a_spec_error(data, where, odd, host):
    changed = {**data, where: {**data.get(where, {}), **odd}} if where else {**data, **odd}

    with contextlib.suppress(SpecError):
        spec_from_dict(changed, host)


@ANY_EXAMPLES
@given(data=ANYTHING)
def test_any_data_is_a_job_or_a_store_error(data):
    with contextlib.suppress(StoreError):
        Job.from_dict(data)


@ANY_EXAMPLES
@given(data=st.dictionaries(st.text(max_size=5), ANYTHING, max_size=4))
def test_what_is_left_after_cleaning_is_json_and_clean(data):
    kept, _ = clean(data)

    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert clean(kept) == (kept, [])


def test_nesting_beyond_pythons_own_limit_is_a_problem(host):
    deep = []
    for _ in range(5000):
        deep = [deep]

    with pytest.raises(SpecError, match="nested more than 32 deep"):
        spec_from_dict({"model": deep, "when": dt.date(2026, 1, 1)}, host)
