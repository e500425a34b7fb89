"""`flash rollouts` on a real plane, with rollouts as a worker writes them."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash.cli import output, root
from flash.cli.rollouts import DIFF_KEYS, JSON_KEYS, ROLLOUT_KEYS, TASK_KEYS
from flash.values import Rollout
from flash.worker.rollouts import Limits, RolloutStore

WAITING = {"memory_gib": 1e6}
SCORES = {
    1: {"add": [0.0, 0.25, None], "mul": [0.5, 0.5]},
    2: {"add": [1.0, 0.25, 0.75], "sub": [0.5, 1.0]},
    3: {"sub": [0.5, 0.5]},
}


class Reporter:
    def emit(self, type_, **data):
        pass


@pytest.fixture
def flash(bench, monkeypatch, capsys):
    """Return a function that runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*words):
        code = root.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def episode(step, task, sample, score, **more):
    said = more.pop("said", f"answer {sample} at {step}")
    messages = (
        {"role": "system", "content": "Compute."},
        {"role": "user", "content": f"{task} 2 and 3"},
        {"role": "assistant", "content": said},
    )
    fields = {
        "step": step,
        "task": task,
        "sample": sample,
        "messages": messages,
        "opening": 2,
        "completion": said,
        "raw": said,
        "score": score,
        "success": score == 1.0,
        "metrics": {"exact": score or 0.0, "length": 0.5},
        "error": "the scorer raised" if score is None else None,
        "advantage": None if score is None else score - 0.5,
        "completion_tokens": 4,
        "turns": 1,
    }
    return Rollout(**fields | more)


def keep(bench, run, step, rollouts, **settings):
    RolloutStore(bench.plane.store(run), Reporter(), **settings).save(step, rollouts)


def sampled_run(bench):
    run = bench.submit("", **WAITING)
    for step, tasks in SCORES.items():
        keep(
            bench,
            run,
            step,
            [
                episode(step, task, sample, score)
                for task, scores in tasks.items()
                for sample, score in enumerate(scores)
            ],
        )
    return run


@pytest.fixture(scope="module")
def run(bench):
    return sampled_run(bench)


@pytest.fixture
def own_run(bench):
    return bench.submit("", **WAITING)


def chosen(said):
    return [(r["step"], r["task"], r["sample"]) for r in json.loads(said)["rollouts"]]


def test_the_newest_step_is_shown_a_line_an_episode(run, flash):
    code, said, _ = flash("rollouts", run)

    lines = said.splitlines()
    assert code == 0
    assert lines[0] == "step 3  2 episodes  1 task  mean score 0.500"
    assert lines[2].split() == ["sub", "0", "0.500", "+0.000", "4", "answer", "0", "at", "3"]


def test_json_is_the_contract(run, flash):
    listed = json.loads(flash("rollouts", run[:8], "--step", "1", "--json")[1])
    compared = json.loads(flash("rollouts", run, "--diff", "1", "2", "--json")[1])

    assert [*listed] == [*JSON_KEYS]
    assert (listed["run"], listed["step"], listed["episodes"], listed["kept"]) == (run, 1, 5, 5)
    assert all([*rollout] == [*ROLLOUT_KEYS] for rollout in listed["rollouts"])
    assert listed["rollouts"][0]["messages"][0] == {"role": "system", "content": "Compute."}
    assert [*compared] == [*DIFF_KEYS]
    assert [*compared["tasks"][0]] == [*TASK_KEYS]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--step", "1", "--best", "2"], [(1, "mul", 0), (1, "mul", 1)]),
        (["--step", "1", "--worst", "2"], [(1, "add", 0), (1, "add", 1)]),
        (["--step", "2", "--best", "9", "--task", "add"], [(2, "add", n) for n in (0, 2, 1)]),
        (["--best", "1"], [(3, "sub", 0)]),
        (["--step", "1", "--errors"], [(1, "add", 2)]),
        (["--task", "mul"], [(1, "mul", 0), (1, "mul", 1)]),
        (["--task", "add"], [(2, "add", 0), (2, "add", 1), (2, "add", 2)]),
        (["--errors"], [(1, "add", 2)]),
        (["--step", "2", "--errors"], []),
        (["--task", "mul", "--errors"], []),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_what_is_asked_for_is_looked_for_from_the_newest_step_on(words, expected, run, flash):
    code, said, _ = flash("rollouts", run, *words, "--json")

    assert code == 0
    assert chosen(said) == expected


def test_nothing_found_is_said_where_it_was_looked_for(run, flash):
    assert flash("rollouts", run, "--step", "2", "--errors")[2] == (
        "no episode of step 2 is without a score\n"
    )
    assert flash("rollouts", run, "--task", "mul", "--errors")[2] == (
        "no episode of any step that is kept is without a score\n"
    )


def test_an_episode_in_full(bench, own_run, flash):
    messages = (
        {"role": "user", "content": [{"type": "text", "text": "first\nquestion"}]},
        {"role": "assistant", "content": "a guess"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
    )
    keep(
        bench,
        own_run,
        4,
        [
            episode(4, "t", 0, 1.0, messages=messages, opening=1, turns=2, thinking="let me see"),
            episode(4, "t", 1, None, messages=messages[:1], opening=1, completion=None),
        ],
    )

    said = flash("rollouts", own_run, "--task", "t")[1]

    assert said.splitlines() == [
        "step 4  task t",
        "  user: first",
        "    question",
        "",
        "  sample 0  score 1.000  advantage +0.500  solved",
        "    4 tokens in 2 turns",
        "    exact 1.000  length 0.500",
        "    assistant: a guess",
        "    user: again",
        "    thinking: let me see",
        '    assistant: {"tool_calls": [{"name": "add"}]}',
        "    graded: answer 0 at 4",
        "",
        "  sample 1  no score",
        "    4 tokens",
        "    exact 0.000  length 0.500",
        "    error: the scorer raised",
        "",
    ]


def test_two_steps_stand_side_by_side_best_first(run, flash):
    code, said, _ = flash("rollouts", run, "--diff", "1", "2")

    lines = said.splitlines()
    rows = [
        tuple(" ".join(half.split()) for half in line.split("│")) for line in lines if "│" in line
    ]
    assert code == 0
    assert lines[:3] == ["task add", "  system: Compute.", "  user: add 2 and 3"]
    assert ("step 1 mean score 0.125 of 2", "step 2 mean score 0.667 of 3") in rows
    assert (
        "sample 1 score 0.250 advantage -0.250",
        "sample 0 score 1.000 advantage +0.500 solved",
    ) in rows
    assert ("assistant: answer 1 at 1", "assistant: answer 0 at 2") in rows
    assert ("error: the scorer raised", "assistant: answer 1 at 2") in rows
    assert max(map(len, lines)) <= 100
    assert "mul" not in said


def test_a_part_of_two_steps(run, flash):
    worst = flash("rollouts", run, "--diff", "2", "1", "--worst", "1", "--json")[1]

    [task] = json.loads(worst)["tasks"]
    assert task["task"] == "add"
    assert [[r["score"] for r in side] for side in task["rollouts"]] == [[0.25], [0.0]]


HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202eabc\r\x9b31m\u2028" + "y" * 3000


def test_hostile_text_cannot_act_on_the_terminal(bench, own_run, flash):
    for step in (1, 2):
        keep(
            bench,
            own_run,
            step,
            [
                episode(
                    step,
                    f"task {HOSTILE}",
                    0,
                    1.0,
                    said=HOSTILE,
                    metrics={HOSTILE: 1.0},
                    reason=HOSTILE,
                    thinking=HOSTILE,
                )
            ],
        )

    for words in ([], ["--best", "1"], ["--diff", "1", "2"], ["--task", HOSTILE], ["--json"]):
        code, *said = flash("rollouts", own_run, *words)
        assert code == (2 if "--task" in words else 0)
        for text in said:
            assert text == output.clean(text)
            assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e", "\u2028"} & set(text)


def test_a_giant_line_is_short_in_the_table_and_wrapped_side_by_side(bench, own_run, flash):
    for step in (1, 2):
        keep(bench, own_run, step, [episode(step, "t", 0, 0.0, said="y" * 3000)])

    table = flash("rollouts", own_run)[1].splitlines()
    beside = flash("rollouts", own_run, "--diff", "1", "2")[1]

    assert max(map(len, table)) <= 110
    assert max(map(len, beside.splitlines())) <= 100
    assert beside.count("y") >= 6000


def test_what_was_left_out_is_said(bench, own_run, flash):
    rollouts = [episode(1, task, 0, 0.0) for task in "abcdef"]
    keep(bench, own_run, 1, rollouts, limits=Limits(step_episodes=2))

    assert flash("rollouts", own_run)[1].startswith("step 1  2 of 6 episodes  2 tasks  ")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--step", "9"], "has no episodes of step 9", "it has steps 1, 2, 3"),
        (["--diff", "1", "9"], "has no episodes of step 9", "it has steps 1, 2, 3"),
        (["--task", "ad"], 'no step that is kept has an episode of task "ad"', "step 3 has sub"),
        (["--task", "sum"], 'of task "sum"; did you mean "sub"?', "step 3 has sub"),
        (
            ["--step", "1", "--task", "sub"],
            'step 1 has no episode of task "sub"',
            "it is in steps 3, 2",
        ),
        (["--step", "1", "--task", "?"], 'has no episode of task "?"', "step 1 has add, mul"),
        (["--diff", "1", "3"], "steps 1 and 3 have no task in common", "in common with step 2"),
        (["--diff", "1", "2", "--task", "mul"], 'step 2 has no episode of task "mul"', "step 1"),
        (["--diff", "2", "2"], "two different steps", "steps 1, 2, 3"),
        (["--best", "1", "--errors"], "exclude one another", "take one"),
        (["--best", "0"], "0 is not in the range x>=1", "--help"),
        (["--diff", "1", "2", "--step", "1"], "--diff names its own steps", "leave --step out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_an_error_that_names_what_is(words, message, hint, run, flash):
    code, said, complaint = flash("rollouts", run, *words)

    error, advice = complaint.splitlines()
    assert (code, said) == (2, "")
    assert message in error
    assert hint in advice


def test_of_many_steps_the_nearest_are_named(bench, own_run, flash):
    for step in range(10, 200, 10):
        keep(bench, own_run, step, [])

    assert (
        "it has 19 steps from 10 to 190; the nearest are 60, 70, 80, 90, 100, 110, 120, 130"
        in (flash("rollouts", own_run, "--step", "95")[2])
    )


def test_a_run_that_is_young_says_so(own_run, flash):
    code, said, complaint = flash("rollouts", own_run)

    assert (code, said) == (2, "")
    assert complaint.splitlines() == [
        f"error: the run {own_run} (sft) has sampled nothing yet: it is queued",
        f"hint: flash status {own_run} --follow watches it",
    ]


def test_a_run_of_an_algorithm_that_samples_nothing_says_so(bench, flash):
    run = bench.submit("say('metric', step=1, total=1, loss=1.0)\nsay('done', steps=1)\n")
    bench.wait(run)

    code, _, complaint = flash("rollouts", run)

    assert code == 2
    assert f"the run {run} (sft) has trained and kept no episodes" in complaint
    assert "samples any" in complaint


def test_a_run_that_ended_before_it_sampled_says_so(bench, flash):
    run = bench.submit("", **WAITING)
    bench.plane.cancel(run)

    assert f"the run {run} (sft) is cancelled and sampled nothing" in flash("rollouts", run)[2]


def damage(bench, run, step):
    path = bench.plane.store(run) / "rollouts" / f"step-{step:06d}.jsonl.gz"
    path.write_bytes(path.read_bytes()[:40])


def test_a_damaged_step_is_passed_over_and_named(bench, flash):
    run = sampled_run(bench)
    damage(bench, run, 3)

    code, said, complaint = flash("rollouts", run, "--json")

    assert code == 0
    assert json.loads(said)["step"] == 2
    assert "warning: " in complaint
    assert "step-000003.jsonl.gz is damaged" in complaint
    code, _, complaint = flash("rollouts", run, "--step", "3")
    assert code == 1
    assert "step-000003.jsonl.gz is damaged" in complaint
    for step in (1, 2):
        damage(bench, run, step)
    assert "no file of the run's 3 steps can be read" in flash("rollouts", run)[2]


def test_a_step_without_episodes_says_so(bench, own_run, flash):
    keep(bench, own_run, 1, [])

    assert flash("rollouts", own_run)[2] == "no episode of any step that is kept was kept\n"


def test_a_foreign_message_is_shown_as_it_is(bench, own_run, flash):
    keep(bench, own_run, 1, [episode(1, "t", 0, 1.0)])
    path = bench.plane.store(own_run) / "rollouts" / "step-000001.jsonl.gz"
    head, row = gzip.decompress(path.read_bytes()).splitlines()
    foreign = json.loads(row) | {
        "messages": [{"content": 3}, {"role": 7, "content": [None, "x"]}],
        "metrics": {"deep": {"a": [1]}, "none": None},
    }
    path.write_bytes(gzip.compress(head + b"\n" + json.dumps(foreign).encode()))

    code, said, _ = flash("rollouts", own_run, "--best", "1")

    assert code == 0
    assert "  ?: 3\n  7: null\n    x\n" in said


def test_the_status_of_a_run_that_sampled_says_how_to_read_it(run, own_run, flash):
    assert f"  flash rollouts {run} " in flash("status", run)[1]
    assert "flash rollouts" not in flash("status", own_run)[1]


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "read-rollouts.md"


def the_pages_run(bench):
    """The run that the page reads."""
    run = bench.submit("", **WAITING)

    def say(step, task, sample, score, text, tokens, **more):
        asked = {"greeting": "hi", "thanks": "thank you"}[task]
        messages = (
            {"role": "system", "content": "Answer politely."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": text},
        )
        fields = {"metrics": {}, "completion_tokens": tokens, "said": text, "messages": messages}
        return episode(step, task, sample, score, **fields | more)

    keep(
        bench,
        run,
        10,
        [
            say(10, "greeting", 0, 0.0, "what", 1, advantage=0.0),
            say(10, "greeting", 1, 0.0, "hi hi", 2, advantage=0.0),
        ],
    )
    polite = {"metrics": {"polite": 1.0, "length": 0.5}, "advantage": 0.577}
    cut = {"truncated": True, "advantage": -0.577}
    failed = {"error": "score_response raised KeyError: 'tone'"}
    keep(
        bench,
        run,
        20,
        [
            say(20, "greeting", 0, 1.0, "Good day.", 3, **polite),
            say(20, "greeting", 1, 0.0, "Hello" + " hello" * 11, 24, **cut),
            say(20, "thanks", 0, 0.25, "thx, bye", 5, advantage=0.0),
            say(20, "thanks", 1, None, "You are welcome.", 4, **failed),
        ],
    )
    return run


# A command, what its output is piped into where it is, and what is printed.
SHOWN = re.compile(
    r"^\$ flash (?P<words>[^\n|]*?)(?: \| python3 -c '(?P<program>.*?)')?\n"
    r"(?P<said>.*?)(?=^\$ |\Z)",
    re.MULTILINE | re.DOTALL,
)


def test_every_command_of_the_page_prints_what_the_page_shows(fresh_bench, flash, monkeypatch):
    run = the_pages_run(fresh_bench)
    monkeypatch.setenv("FLASH_HOME", str(fresh_bench.home.root))
    text = PAGE.read_text("utf-8").replace("1aetcexnf", run)
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = [found for block in blocks for found in SHOWN.finditer(block)]

    assert len(shown) == text.count("$ flash") == 5
    for found in shown:
        code, said, complaint = flash(*found["words"].split())
        if found["program"]:
            said = subprocess.run(
                [sys.executable, "-c", found["program"]],
                input=said,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        assert (code, complaint) == (0, "")
        assert lines_of(said) == lines_of(found["said"])


def lines_of(text):
    return [line.rstrip() for line in text.splitlines()]
