"""Two evaluations of the same tasks: what one gained, and when nothing may be said."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.comparison import compare, compare_rows, incomparable
from flash.evaluate import numbers


def row(place, score, *, sample=0, success=None, **more):
    return {
        "row": place,
        "sample": sample,
        "id": str(place),
        "input": f"row {place}",
        "score": score,
        "success": bool(score and score >= 1) if success is None else success,
        "metrics": {},
        "truncated": False,
        "error": None if score is not None else "no network",
    } | more


def evaluation(rows, **more):
    return (
        {
            "digest": "sha256:1",
            "params": {},
            "reward": {},
            "split": "eval",
            "samples": 1,
            "temperature": 0.0,
            "max_tokens": 64,
            "thinking": False,
            "suites": {},
        }
        | numbers(rows)
        | {"rows": rows}
        | more
    )


def test_rows_are_paired_by_task_and_not_by_place():
    before = [row(place, place / 10) for place in range(8)]
    after = [row(place, place / 10 + 0.3) for place in reversed(range(8))]
    shuffled = [one | {"row": 7 - one["row"]} for one in after]

    found = compare_rows(before, shuffled)

    assert found["n"] == 8
    assert found["mean"]["gain"] == pytest.approx(0.3)
    assert (found["up"], found["same"], found["down"]) == (8, 0, 0)


@pytest.mark.parametrize(
    ("step", "word"), [(0.3, "better"), (-0.3, "worse"), (0.0, "no change beyond noise")]
)
def test_the_verdict_is_one_of_three(step, word):
    before = [row(place, 0.4 + place % 3 / 10) for place in range(30)]
    after = [row(place, 0.4 + (place + 1) % 3 / 10 + step) for place in range(30)]

    assert compare_rows(before, after)["verdict"] == word


def test_scores_that_are_only_success_are_judged_by_the_interval_of_success():
    """Student's t would call 6 of 6 rows beyond noise at once; Newcombe's interval does not."""
    before = [row(place, 0.0) for place in range(3)]
    after = [row(place, 1.0) for place in range(2)] + [row(2, 0.0)]

    found = compare_rows(before, after)

    assert found["verdict"] == found["success"]["verdict"] == "no change beyond noise"
    assert (
        compare_rows([row(n, 0.0) for n in range(9)], [row(n, 1.0) for n in range(9)])["verdict"]
        == "better"
    )


def test_rows_that_one_side_could_not_score_are_in_no_number():
    before = [row(0, 0.5), row(1, None), row(2, 0.5)]
    after = [row(0, 0.7), row(1, 0.0), row(3, 1.0)]

    found = compare_rows(before, after)

    assert (found["n"], found["left_out"]) == (1, 3)
    assert found["mean"]["after"] == 0.7


def test_nothing_in_common_has_no_verdict():
    found = compare_rows([row(0, 1.0)], [row(0, 1.0, input="another")])

    assert (found["n"], found["verdict"], found["mean"]["before"]) == (0, None, None)


def test_several_answers_a_row_count_as_one_row():
    before = [row(place, 0.25, sample=sample) for place in range(10) for sample in range(2)]
    after = [
        row(place, 0.25 + sample / 2, sample=sample, success=sample == 1)
        for place in range(10)
        for sample in range(2)
    ]

    found = compare_rows(before, after)

    assert found["n"] == 10
    assert found["mean"]["gain"] == pytest.approx(0.25)
    assert (found["success"]["before"], found["success"]["after"]) == (0.0, 0.5)


def test_tasks_with_one_id_and_one_text_are_told_apart_by_their_order():
    twins = [row(0, 0.0, id="a", input="x"), row(1, 1.0, id="a", input="x")]

    found = compare_rows(twins, twins)

    assert (found["n"], found["same"], found["left_out"]) == (2, 2, 0)


def test_metrics_are_compared_where_every_row_has_them():
    before = [
        row(0, 0.5, metrics={"format": 1.0, "rare": 1.0}),
        row(1, 0.5, metrics={"format": 0.0}),
    ]
    after = [row(place, 0.5, metrics={"format": 1.0}) for place in range(2)]

    assert compare_rows(before, after)["metrics"] == {"format": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("digest", "sha256:2", "different versions of the environment: sha256:1 and sha256:2"),
        ("split", "test", "different splits: eval and test"),
        ("params", {"level": 2}, "different [environment.params]"),
        ("reward", {"judge": {}}, "different [reward.*] tables"),
    ],
)
def test_scores_that_other_code_or_rows_gave_are_not_compared(key, value, said):
    one, other = evaluation([row(0, 1.0)]), evaluation([row(0, 1.0)], **{key: value})

    assert said in incomparable(one, other)
    assert incomparable(one, one) is None


def test_settings_that_differ_are_said():
    one, other = evaluation([row(0, 1.0)]), evaluation([row(0, 1.0)], temperature=1.0, samples=4)

    assert compare(one, other)["notes"] == [
        "samples differs: 1 and 4",
        "temperature differs: 0.0 and 1.0",
    ]


def test_suites_that_both_ran_are_compared_on_their_own():
    rows = [row(place, 0.5 + place / 100) for place in range(10)]
    better = [one | {"score": one["score"] + 0.2 + one["row"] / 100} for one in rows]
    one = evaluation([], split=None, suites={"a": {"rows": rows}, "b": {"rows": rows}})
    other = evaluation([], split=None, suites={"a": {"rows": better}})

    found = compare(one, other)

    assert (found["n"], found["verdict"]) == (0, None)
    assert {name: suite["verdict"] for name, suite in found["suites"].items()} == {"a": "better"}
    assert found["notes"] == ["only one of them has the suite b"]
    json.dumps(found)


answers = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=40)


@settings(max_examples=60)
@given(answers, answers)
def test_what_one_gains_the_other_loses(one, other):
    before, after = ([row(n, score) for n, score in enumerate(side)] for side in (one, other))

    there, back = compare_rows(before, after), compare_rows(after, before)

    assert (there["n"], there["left_out"]) == (back["n"], back["left_out"])
    assert (there["up"], there["down"]) == (back["down"], back["up"])
    assert there["up"] + there["same"] + there["down"] == there["n"]
    assert there["mean"]["gain"] == pytest.approx(-back["mean"]["gain"])
    turned = {"better": "worse", "worse": "better"}
    assert turned.get(there["verdict"], there["verdict"]) == back["verdict"]
