"""Every folder of `examples/` is a complete project that does what its README says."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flash.comparison import compare_rows
from flash.context import plugin_context
from flash.home import FlashHome
from flash.plan import make_plan
from flash.plugins import PluginHost
from flash.spec.resolve import resolve
from flash.values import Episode

EXAMPLES = Path(__file__).parents[1] / "examples"
LEARNING = EXAMPLES.parent / "bench" / "results" / "grpo-learning.json"
PROJECTS = sorted(path.parent.name for path in EXAMPLES.glob("*/environment.py"))
CONFIGS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/configs/*.toml"))


@pytest.fixture
def home(tmp_path):
    return FlashHome(tmp_path / "home")


@pytest.fixture
def host(home):
    return PluginHost.default(home)


def load(project, host, home):
    record = host.get("environment", "freesolo")
    loader = record.make(plugin_context(home, "freesolo", {}))
    return loader.load(EXAMPLES / project, params={}, split="train")


def rows(project, split):
    text = (EXAMPLES / project / "dataset" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_there_are_examples():
    assert PROJECTS
    assert {path.split("/")[0] for path in CONFIGS} == set(PROJECTS)


@pytest.mark.parametrize("project", PROJECTS)
def test_the_generator_writes_the_dataset_byte_for_byte(project, tmp_path):
    subprocess.run(
        [sys.executable, EXAMPLES / project / "generate.py", "--out", tmp_path],
        check=True,
        capture_output=True,
    )

    kept = {path.name: path.read_bytes() for path in (EXAMPLES / project / "dataset").iterdir()}
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == kept


@pytest.mark.parametrize("project", PROJECTS)
def test_no_held_out_row_was_trained_on(project):
    trained, held_out = ([row["input"] for row in rows(project, s)] for s in ("train", "eval"))

    assert len(trained) >= 200
    assert len(held_out) >= 100
    assert len({*trained, *held_out}) == len(trained) + len(held_out)


@pytest.mark.parametrize("project", PROJECTS)
def test_every_gold_answer_succeeds_and_an_empty_one_does_not(project, host, home):
    environment = load(project, host, home)

    assert list(environment.splits()) == ["train", "eval"]
    for split in environment.splits():
        for task in environment.tasks(split):
            gold = "".join(message["content"] for message in environment.target(task))
            best, empty = environment.score(task, [Episode((), gold), Episode((), "")])
            assert best.success, task.input
            assert best.error is None
            assert not empty.success
            assert empty.error is None


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_can_be_submitted(config, host, home):
    path = EXAMPLES / config

    plan = make_plan(resolve(path, host=host), host, home, offline=True)

    assert plan.errors == []
    assert plan.spec is not None
    assert tomllib.loads(path.read_text(encoding="utf-8"))["model"] == plan.spec.model


@pytest.mark.parametrize("project", PROJECTS)
def test_every_toml_of_a_readme_is_a_config_of_the_project(project):
    readme = (EXAMPLES / project / "README.md").read_text(encoding="utf-8")
    configs = [path.read_text(encoding="utf-8") for path in (EXAMPLES / project).glob("configs/*")]

    for block in re.findall(r"```toml\n(.*?)```", readme, re.DOTALL):
        assert any(block in config for config in configs), block


def module_of(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bookings():
    return module_of(EXAMPLES / "bookings" / "generate.py")


@pytest.fixture(scope="module")
def demo():
    return module_of(EXAMPLES / "demo.py")


def test_held_out_bookings_have_sentences_and_surnames_of_their_own(bookings):
    assert not set(bookings.TRAIN_NAMES.split()) & set(bookings.EVAL_NAMES.split())
    assert not set(bookings.TRAIN_SENTENCES) & set(bookings.EVAL_SENTENCES)
    trained, held_out = (
        {json.loads(row["output"])["name"] for row in rows("bookings", split)}
        for split in ("train", "eval")
    )
    assert trained <= set(bookings.TRAIN_NAMES.split())
    assert held_out <= set(bookings.EVAL_NAMES.split())


@pytest.mark.parametrize(
    ("change", "metrics"),
    [
        (lambda gold: "no JSON", {"valid_json": 0, "people": 0, "day": 0}),
        (lambda gold: "[]", {"valid_json": 0, "people": 0, "day": 0}),
        (lambda gold: {"people": gold["people"]}, {"valid_json": 0, "people": 0, "day": 0}),
        (lambda gold: gold | {"note": ""}, {"valid_json": 0, "people": 0, "day": 0}),
        (lambda gold: gold | {"people": str(gold["people"])}, {"valid_json": 1, "people": 0}),
        (lambda gold: gold | {"day": "never"}, {"valid_json": 1, "people": 1, "day": 0}),
    ],
)
def test_a_booking_is_scored_field_by_field(change, metrics, host, home):
    environment = load("bookings", host, home)
    task = environment.tasks("eval")[0]
    said = change(json.loads(rows("bookings", "eval")[0]["output"]))

    (reward,) = environment.score(
        task, [Episode((), said if isinstance(said, str) else json.dumps(said, indent=1))]
    )

    assert not reward.success
    assert metrics.items() <= reward.metrics.items()


def test_spacing_and_the_order_of_keys_do_not_count(host, home):
    environment = load("bookings", host, home)
    task = environment.tasks("eval")[0]
    gold = json.loads(rows("bookings", "eval")[0]["output"])

    (reward,) = environment.score(
        task, [Episode((), json.dumps(dict(reversed(gold.items())), indent=2))]
    )

    assert reward.success


def test_a_falling_loss_is_drawn_falling(demo):
    *rows, axis, ruler = demo.plot(
        [8.0, 4.0, 2.0, 1.0], unicode=False, logarithmic=True
    ).splitlines()

    heights = [sum(row[9:].ljust(4)[column] == "#" for row in rows) for column in range(4)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == demo.HEIGHT
    assert heights[-1] == 1
    assert rows[0].split()[0] == "8"
    assert rows[-1].split()[0] == "1"
    assert (axis.strip(), ruler.split()) == ("+----", ["step", "1", "4"])


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("rewards", [[1.0], [0.0, 0.0], [-3.0, 0.0, 1.0] * 100, []])
def test_any_curve_can_be_drawn_as_the_terminal_allows(demo, rewards, unicode):
    drawn = demo.plot(rewards, unicode=unicode)

    assert drawn.isascii() or unicode
    assert max(map(len, drawn.splitlines())) <= demo.WIDTH + 10


def result(successes):
    rows = [
        {
            "row": place,
            "id": str(place),
            "success": success,
            "score": float(success),
            "metrics": {},
            "error": None,
            "input": "table?",
            "completion": "a\nb\x1b",
        }
        for place, success in enumerate(successes)
    ]
    rate = sum(successes) / len(successes)
    metrics = {"valid_json": rate, "words": 20 * rate}
    return {"success": rate, "interval": [0.1, 0.2], "metrics": metrics, "rows": rows}


def report(demo, before, after):
    before, after = result(before), result(after)
    difference = compare_rows(before["rows"], after["rows"])
    return demo.scores(before | {"difference": difference}, after)


def test_the_report_says_whether_a_gain_is_beyond_chance(demo):
    large = report(demo, [False] * 20, [True] * 20)
    small = report(demo, [True, False] * 5, [True] * 6 + [False] * 4)

    assert "success         0.0%    100.0%" in large
    assert "words            0.0      20.0" in large
    assert "+100.0 points" in large
    assert "verdict: better" in large
    assert "verdict: no change beyond noise" in small


def test_the_report_shows_right_answers_and_one_that_is_still_wrong(demo):
    shown = demo.examples(result([False] * 9)["rows"], result([True] * 4 + [False] * 5)["rows"])

    assert shown.count("which is right") == 2
    assert shown.endswith("which is wrong")
    assert "a b?" in shown


@pytest.mark.parametrize(
    ("practised", "words"), [(False, "train.epochs=2"), (True, "rollouts 1abc --worst 3")]
)
def test_the_report_ends_with_commands_that_fit_the_algorithm(demo, practised, words):
    assert words in demo.next_commands("1abc", "a.toml", practised=practised)


@pytest.fixture
def glossary(host, home):
    """Score an answer to the question for a bakery."""
    environment = load("glossary", host, home)
    (task,) = (
        task
        for split in environment.splits()
        for task in environment.tasks(split)
        if task.input == "What is a bakery?"
    )

    def score(said):
        (reward,) = environment.score(task, [Episode((), said)])
        assert reward.error is None
        return reward

    return score


@pytest.mark.parametrize(
    "said",
    [
        "A bakery is a shop that sells bread.",
        "It is a place where cakes are made!",
        "You can buy bread and cakes there, and it smells of pastry.",
    ],
)
def test_a_short_right_definition_is_paid_in_full(glossary, said):
    assert glossary(said).success
    assert glossary(said).score == 1


@pytest.mark.parametrize(
    ("said", "failed"),
    [
        ("", "sentence"),
        ("junk", "sentence"),
        ("What is a bakery?", "sentence"),
        ("A bakery is bread", "sentence"),
        ("a bakery is a shop that sells bread.", "sentence"),
        ("It is bread. It is a shop.", "sentence"),
        ("It is a shop\nfor bread.", "sentence"),
        ("It is bread, cakes, pastries, a shop.", "sentence"),
        ("Bread cakes pastries flour dough oven.", "sentence"),
        ("Bread is bread and bread is the bread.", "sentence"),
        ("It is a shop that sells things.", "right"),
        ("One bakery is as good as the other.", "right"),
        ("A bakery is a bakery for the baker.", "sentence"),
        ("A bakery is a place on the", "sentence"),
    ],
)
def test_what_explains_nothing_or_is_no_sentence_is_paid_nothing(glossary, said, failed):
    reward = glossary(said)

    assert reward.score == 0
    assert not reward.success
    assert reward.metrics[failed] == 0


def test_a_right_definition_is_paid_less_the_longer_it_is(glossary):
    opening = "It is a shop that sells bread to the people who live in the"
    scores = [glossary(f"{opening} {end}.").score for end in ("town", "big old town", "x y z u v")]

    assert not glossary(f"{opening} town.").success
    assert 1 > scores[0] > scores[1] > scores[2] > 0


@pytest.mark.parametrize(
    "said",
    [
        "It is a thing that is used by people.",
        "It is a place where people go to eat food.",
        "It is a small animal with fur that lives in the forest.",
        "It is a large body of water with fish.",
        "It is food, water and light for the sea.",
    ],
)
def test_no_one_answer_defines_many_words(host, home, said):
    environment = load("glossary", host, home)
    tasks = [task for split in environment.splits() for task in environment.tasks(split)]

    right = sum(environment.score(task, [Episode((), said)])[0].success for task in tasks)
    assert right < 0.2 * len(tasks)


def test_held_out_words_of_the_glossary_are_never_trained_on():
    trained, held_out = (
        {row["metadata"]["word"] for row in rows("glossary", split)} for split in ("train", "eval")
    )

    assert not trained & held_out


def test_the_record_of_what_grpo_teaches_is_of_the_config_as_it_is():
    record = json.loads(LEARNING.read_text(encoding="utf-8"))
    config = (EXAMPLES.parent / record["config"]).read_text(encoding="utf-8")

    assert record["settings"] == tomllib.loads(config)
    assert len({one["seed"] for one in record["seeds"]}) >= 3
    readme = (EXAMPLES / "glossary" / "README.md").read_text(encoding="utf-8")
    for one in record["seeds"]:
        before, after = (f"{one[when]['success']:.1%}" for when in ("before", "after"))
        assert f"| {one['seed']} | {before} | {after} |" in readme
        assert one["after"]["n"] == len(rows("glossary", "eval"))
        assert one["success_gain"]["verdict"] == "better"
        assert one["train_s"] + one["evaluate_s"] <= 15 * 60
        assert len(one["steps"]["success"]) == record["settings"]["train"]["steps"]
