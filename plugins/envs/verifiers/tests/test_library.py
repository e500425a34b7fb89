"""Environments of the verifiers library itself, run in an interpreter that has it."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from flash.api import Environment, EnvironmentFault, Episode
from flash.episodes import Answer, play

pytestmark = pytest.mark.slow


@pytest.fixture
def backwards(load):
    return load(
        "backwards",
        env={"taskset": {"language": "Latin"}},
        splits={"train": {"limit": 3}, "test": {"skip": 3}},
        target="answer",
    )


@pytest.fixture
def guess(load):
    return load("guess", splits={"train": {"limit": 3}})


def said(role, content):
    return {"role": role, "content": content}


def saying(*texts):
    """A model that says these texts, one a turn, in every episode."""

    def model(questions):
        for place, question in enumerate(questions):
            yield place, Answer(texts[int(question.stream.rpartition("/")[2])])

    return model


def test_a_single_turn_environment_is_tasks_gold_answers_and_one_turn(backwards):
    task = backwards.tasks("train")[0]

    assert isinstance(backwards, Environment)
    assert backwards.splits() == ("train", "test")
    assert [one.id for one in backwards.tasks("train")] == ["flash", "model", "reward"]
    assert [one.id for one in backwards.tasks("test")] == ["value"]
    assert (task.input, task.metadata) == ("Spell flash backwards.", {"answer": "hsalf"})
    assert backwards.target(task) == [said("assistant", "hsalf")]
    assert backwards.max_turns(task) == 1
    assert backwards.start(task) == [
        said("system", "Answer with one word of Latin."),
        said("user", "Spell flash backwards."),
    ]


def test_rewards_are_weighted_and_metrics_named(backwards):
    task = backwards.tasks("train")[0]
    played = [*play(backwards, [task], saying("hsalf")), *play(backwards, [task], saying("zzz"))]

    right, wrong = backwards.score(task, [one.episode for one in played])

    assert (right.score, right.success) == (1.5, True)
    assert right.metrics == {"exact": 1.0, "similar": 1.0, "letters": 5.0}
    assert (wrong.score, wrong.success) == (0.0, False)


def test_a_group_is_open_at_once_and_each_of_it_has_its_own_reward(backwards):
    task = backwards.tasks("train")[1]
    texts = ["ledom", "model", "ledo", "ledom"] * 4

    def model(questions):
        assert len(questions) == 16
        return [(place, Answer(texts[place])) for place in range(16)]

    played = play(backwards, [task] * 16, model)
    rewards = backwards.score(task, [one.episode for one in played])

    assert [reward.success for reward in rewards] == [text == "ledom" for text in texts]


def test_an_episode_can_be_scored_again_and_without_having_been_played(backwards):
    task = backwards.tasks("train")[2]
    messages = (*backwards.start(task), said("assistant", "drawer"))
    episode = Episode(messages, "drawer")

    first, second = backwards.score(task, [episode])[0], backwards.score(task, [episode])[0]

    assert first == second
    assert first.success


def test_a_multi_turn_environment_answers_each_turn_and_keeps_its_state(guess):
    task = guess.tasks("train")[1]
    (played,) = play(guess, [task], saying("3", "8", "7"))

    assert [message["content"] for message in played.episode.messages] == [
        "Guess a number from 0 to 9.",
        "3",
        "higher (1 tried)",
        "8",
        "lower (2 tried)",
        "7",
    ]
    (reward,) = guess.score(task, [played.episode])
    assert reward.score == pytest.approx(1 / 3)


def test_an_episode_ends_with_the_turns_that_the_environment_allows(guess):
    task = guess.tasks("train")[1]
    (played,) = play(guess, [task], saying("1", "2", "3", "4"))

    assert guess.max_turns(task) == 4
    assert len(played.answers) == 4
    assert guess.score(task, [played.episode])[0].score == 0.0


def test_an_episode_that_flash_cuts_off_is_scored_as_far_as_it_went(guess):
    task = guess.tasks("train")[0]

    def model(questions):
        first = questions[0].said is None
        yield 0, Answer("5") if first else Answer("", full=True)

    (played,) = play(guess, [task], model)

    assert played.episode.truncated
    assert guess.score(task, [played.episode])[0].score == 0.0


def test_episodes_of_one_task_that_took_different_ways_are_told_apart(guess):
    task = guess.tasks("train")[1]
    quick, slow = (play(guess, [task], saying(*texts))[0] for texts in (["7"], ["1", "7"]))

    rewards = guess.score(task, [slow.episode, quick.episode])

    assert [reward.score for reward in rewards] == [0.5, 1.0]


def test_an_environment_that_breaks_in_an_episode_costs_that_episode_alone(guess):
    task = guess.tasks("train")[1]
    broken, fine = play(guess, [task], saying("crash"))[0], play(guess, [task], saying("7"))[0]

    failed, scored = guess.score(task, [broken.episode, fine.episode])

    assert failed.score is None
    assert "the game broke" in failed.error
    assert scored.score == 1.0


def test_no_reward_and_a_failing_one_are_reasons_and_no_zero(load):
    unscored = load("unscored", splits={"train": {}, "failing": {"taskset": {"fails": True}}})
    errors = []
    for split in ("train", "failing"):
        task = unscored.tasks(split)[0]
        (played,) = play(unscored, [task], saying("something"))
        (reward,) = unscored.score(task, [played.episode])
        assert reward.score is None
        errors.append(reward.error)

    assert errors[0] == "the environment has no reward"
    assert "the judge is ill" in errors[1]


@pytest.mark.parametrize(
    ("name", "env", "says", "hint"),
    [
        (
            "needs-more",
            {},
            "the environment needs the package package_that_is_nowhere",
            'packages = ["package_that_is_nowhere"]',
        ),
        ("textarena", {}, "the environment needs the package nltk", 'packages = ["verifiers[ta]"]'),
        ("nowhere", {}, "there is no verifiers environment called nowhere", "packages"),
        ("written-before", {}, "is written for verifiers before 0.4", "Taskset in __all__"),
        ("tooled", {}, "the environment serves tools (Clock)", "messages alone"),
        ("backwards", {"agent": {"max_turns": "many"}}, "agent.max_turns", "library's own"),
        ("backwards", {"taskset": {"tongue": "Latin"}}, "taskset", "library's own"),
        ("backwards", {"id": "nowhere"}, "no verifiers environment called nowhere", None),
    ],
)
def test_what_is_wrong_with_an_environment_is_said_with_what_to_do(process, name, env, says, hint):
    with pytest.raises(EnvironmentFault) as caught:
        process.call("load", id=name, env=env, splits={"train": {}})

    assert says in caught.value.message
    assert hint is None or hint in f"{caught.value.message} {caught.value.hint}"


def test_tasks_that_fail_name_the_file_and_endless_ones_want_a_limit(process):
    for name, says in (
        ("broken", r"broken\.py:8: ValueError: the rows are gone"),
        ("guess", "never"),
    ):
        process.call("load", id=name, env={}, splits={"train": {}})
        with pytest.raises(EnvironmentFault, match=says):
            process.call("tasks", split="train")


def test_a_second_agent_needs_a_model_of_its_own(process):
    process.call("load", id="backwards", env={"id": "user-sim"}, splits={"train": {}})
    process.call("tasks", split="train")

    with pytest.raises(EnvironmentFault) as caught:
        process.call("start", split="train", index=0)

    assert "the agent user asks the model that is trained" in caught.value.message


@pytest.fixture
def user():
    """A server that plays the user of a conversation: one request, then it is content."""
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append(asked["messages"])
            content = "Spell flash backwards!" if len(heard) == 1 else "###DONE###"
            choice = {"index": 0, "finish_reason": "stop", "message": said("assistant", content)}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "user"}
            body = json.dumps({**answer, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", heard
        server.shutdown()


def test_a_second_seat_may_be_a_model_of_its_own(load, user):
    address, heard = user
    client = {"type": "eval", "base_url": address, "api_key_var": "NO_KEY"}
    talk = load("backwards", env={"id": "user-sim", "user": {"model": "user", "client": client}})
    task = talk.tasks("train")[0]

    (played,) = play(talk, [task], saying("hsalf"))
    (reward,) = talk.score(task, [played.episode])

    assert [message["content"] for message in played.episode.messages[-2:]] == [
        "Spell flash backwards!",
        "hsalf",
    ]
    assert heard[1][-1] == said("user", "hsalf")
    assert (reward.score, reward.metrics["user_turns"]) == (1.5, 2.0)
