"""What people are told of a run's attempts: when, where, how each ended, what that cost."""

import json
import re
import time

import attrs
import pytest

from flash.cli import root
from flash.cli.story import WORDS, ended_as, place, story, usd, waiting
from flash.plane.runs import Attempt, Run
from flash.values import Outcome

RUN = Run(
    id="0abcdefgh",
    state="running",
    fence=1,
    cancel_requested=False,
    not_before_s=None,
    waiting=None,
    spec={"budget": {"max_hours": None, "max_usd": None}},
    caller={},
    error=None,
    hint=None,
    created_s=0.0,
    updated_s=0.0,
    finished_s=None,
    change=1,
    retries_from=0,
    budget_warned=False,
)
NOON = time.mktime((2026, 7, 5, 12, 0, 0, 0, 0, -1))
LOST = Attempt(
    fence=1,
    run=RUN.id,
    number=1,
    state="released",
    provider="cloud",
    offer={"id": "a100-1", "accelerator": "NVIDIA A100", "count": 2, "price_usd_hour": 4.0},
    ref=None,
    stopping=None,
    outcome="lost",
    exit_code=137,
    detail="the worker was ended by SIGKILL",
    started_s=NOON,
    ended_s=NOON + 900,
    step=150,
    then="tried again at once, from step 150",
    reported_usd=0.25,
)
DONE = attrs.evolve(
    LOST,
    number=2,
    provider="local",
    offer={"id": "cpu", "accelerator": None, "price_usd_hour": 0.0},
    outcome="finished",
    exit_code=0,
    detail="",
    started_s=NOON + 960,
    ended_s=NOON + 1000,
    then=None,
    reported_usd=0.0,
    step=400,
)


def test_each_attempt_is_told_with_time_place_cost_end_and_what_was_done():
    assert list(story(RUN, [LOST, DONE])) == [
        "attempt 1  2026-07-05 12:00:00  on cloud (2x NVIDIA A100), 15 min 0 s, 1.25 USD",
        "  was lost: the worker was ended by SIGKILL (exit code 137)",
        "  tried again at once, from step 150",
        "attempt 2  2026-07-05 12:16:00  on local (cpu), 40 s",
        "  finished",
    ]


def test_what_a_failed_attempt_had_saved_is_said_unless_it_was_gone_on_from():
    failed = attrs.evolve(LOST, outcome="user_error", then="not tried again: it would fail again")

    assert list(story(RUN, [failed]))[2:] == [
        "  not tried again: it would fail again",
        "  the checkpoint of step 150 is kept",
    ]


def test_what_stands_above_as_the_error_is_not_said_twice():
    failed = attrs.evolve(RUN, state="failed", error=f"{LOST.detail} (attempt 1; and so on)")

    assert list(story(failed, [LOST]))[1] == "  was lost (exit code 137)"


@pytest.mark.parametrize(
    ("changes", "now"),
    [
        ({"state": "launching"}, "is being launched"),
        ({"state": "live"}, "is running"),
        (
            {"state": "live", "stopping": "over_budget"},
            "is being stopped: the run reached its budget",
        ),
    ],
)
def test_an_attempt_that_has_not_ended_says_what_it_does(changes, now):
    attempt = attrs.evolve(LOST, outcome=None, ended_s=None, then=None, step=None, **changes)
    head, line = story(RUN, [attrs.evolve(attempt, started_s=time.time() - 90)])

    assert line == f"  {now}"
    assert re.search(r"1 min 3\d s, 0\.35 USD$", head)


def test_every_outcome_has_words():
    assert set(WORDS) == set(Outcome.__args__)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"outcome": "preempted", "exit_code": None, "detail": "host went away"},
            "was preempted: its machine was taken away (host went away)",
        ),
        (
            {"outcome": "stalled", "detail": "no progress for 1800 s in its phase 'train'"},
            "stalled and was stopped: no progress for 1800 s in its phase 'train' (exit code 137)",
        ),
        ({"exit_code": 3, "detail": "it exited with code 3"}, "was lost: it exited with code 3"),
        ({"detail": "a\nb\x1b[2J" + "c" * 999}, None),
        ({"outcome": None}, "has not ended"),
    ],
)
def test_an_end_is_one_short_line(changes, said):
    line = ended_as(attrs.evolve(LOST, **changes))

    assert said is None or line == said
    assert "\n" not in line
    assert len(line) < 400


def test_the_place_says_region_and_spot():
    offer = {"id": "x", "accelerator": None, "region": "eu-1", "spot": True, "count": 1}

    assert place(attrs.evolve(LOST, offer=offer)) == "cloud (x, eu-1, spot)"
    assert usd(LOST) == 1.25


def test_a_run_that_waits_says_why_and_until_when():
    queued = attrs.evolve(RUN, state="queued", waiting="it needs more memory")

    assert waiting(RUN, [LOST], NOON) is None
    assert waiting(attrs.evolve(RUN, state="queued"), [], NOON) is None
    assert waiting(queued, [], NOON) == "waiting: it needs more memory"
    assert waiting(attrs.evolve(queued, not_before_s=NOON + 5), [], NOON) == (
        "waiting: it needs more memory; next look at 2026-07-05 12:00:05, in 5 s"
    )
    assert (
        waiting(attrs.evolve(RUN, state="queued", not_before_s=NOON + 90), [LOST], NOON)
        == "waiting: attempt 2 is launched next; launch at 2026-07-05 12:01:30, in 1 min 30 s"
    )


RETRIED = (
    "say('phase', name='train')\n"
    "first, last = {1: (1, 4), 2: (3, 6)}[attempt]\n"
    "for step in range(first, last + 1):\n"
    "    say('metric', step=step, total=6, loss=4.0 / step + attempt, eta_s=9.0)\n"
    "say('warning', message='3 rows were dropped')\n"
    "if attempt == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    "say('done', steps=6)\n"
)


@pytest.mark.slow  # a run of two attempts
def test_a_retried_run_reads_like_a_story(bench, monkeypatch, capsys):
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    run = bench.submit(RETRIED, max_hours=2)
    bench.wait(run)

    root.run(["status", run])
    told = capsys.readouterr().out
    root.run(["status", run, "--json"])
    status = json.loads(capsys.readouterr().out)

    expected = r"""\s*{run}  done  \d+ s
  sft of org/model
  step 6/6  loss 2\.6667
  loss  \S+
  attempt 1  {moment}  on local \(.+\), \d+ s
    was lost: the worker was ended by SIGKILL \(exit code 137\)
    tried again at once, from the start
  attempt 2  {moment}  on local \(.+\), \d+ s
    finished
  worked \d+ s of 2 h 0 min
  warning: 3 rows were dropped

.*"""
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(expected.format(run=run, moment=moment), told, re.DOTALL) is not None, told
    # Steps 3 and 4 were taken twice: the later attempt's numbers stand, each step once.
    assert [step for step, _ in status["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in status["losses"]][1:4] == [3.0, 4.0 / 3 + 2, 3.0]
    first, second = status["attempts"]
    assert (first["then"], first["step"]) == ("tried again at once, from the start", None)
    assert (second["outcome"], second["usd"], second["reported_usd"]) == ("finished", 0.0, 0.0)
    assert status["budget"]["max_hours"] == 2
    worked_s = first["worked_s"] + second["worked_s"]
    assert status["budget"]["hours"] * 3600 == pytest.approx(worked_s)
    assert worked_s > 0
