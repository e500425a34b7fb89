from __future__ import annotations

import time

import pytest

from flash.episodes import Answer, play, split_thinking
from flash.errors import EnvironmentFault
from flash.values import Step, Task


class Countdown:
    """Asks for numbers down to zero; `task.data` is where it starts."""

    max_score_concurrency = 1

    def __init__(self):
        self.seen = []

    def start(self, task):
        if task.data == "no start":
            raise EnvironmentFault("environment.py:3: no start")
        return [{"role": "user", "content": f"from {task.data}"}]

    def tools(self, task):
        return [{"type": "function"}] if task.data == 5 else None

    def max_turns(self, task):
        return 3

    def step(self, task, messages, action):
        assert messages[-1] == {"role": "assistant", "content": action}
        self.seen.append(action)
        if action == "break":
            raise EnvironmentFault("environment.py:9: broken")
        done = action == "0"
        text = "graded" if action == "0" and task.data == 9 else None
        return Step(done, () if done else ({"role": "user", "content": "next"},), text, {"a": 1})


def tasks(*starts):
    return [Task(id=str(place), input="", data=start) for place, start in enumerate(starts)]


class Script:
    """A model that reads its lines, by the opening message, and notes what it was asked."""

    def __init__(self, **lines):
        self.lines = {name.removeprefix("_"): list(said) for name, said in lines.items()}
        self.asked = []

    def __call__(self, questions):
        self.asked.append(questions)
        answers = []
        for question in questions:
            said = self.lines[question.messages[0]["content"].removeprefix("from ")].pop(0)
            answers.append(said if isinstance(said, Answer) else Answer(said))
        return list(enumerate(answers))


def test_episodes_take_their_turns_together_until_each_is_over():
    model = Script(_1=["0"], _2=["1", "0"], _3=["2", "1", "7"])

    played = play(Countdown(), tasks(1, 2, 3), model)

    assert [len(questions) for questions in model.asked] == [3, 2, 1]
    assert [one.episode.completion for one in played] == ["0", "0", "7"]
    assert [len(one.episode.messages) for one in played] == [2, 4, 7]
    assert [one.task.id for one in played] == ["0", "1", "2"]


def test_the_model_sees_the_conversation_and_the_tools():
    model = Script(_5=["4", "0"])

    play(Countdown(), tasks(5), model)

    (first,), (second,) = model.asked
    assert first.tools == [{"type": "function"}]
    assert [message["content"] for message in second.messages] == ["from 5", "4", "next"]


def test_the_thinking_trace_is_kept_from_the_environment():
    environment = Countdown()
    model = Script(_1=["<think>down\nwe go</think>\n\n0"])

    (one,) = play(environment, tasks(1), model)

    assert environment.seen == ["0"]
    assert one.episode.completion == "0"
    assert one.episode.thinking == "down\nwe go"
    assert one.episode.raw == "<think>down\nwe go</think>\n\n0"
    assert one.episode.messages[-1]["content"] == "0"


def test_the_environments_final_text_is_what_is_graded():
    (one,) = play(Countdown(), tasks(9), Script(_9=["0"]))

    assert one.episode.completion == "graded"
    assert one.episode.raw == "0"
    assert one.episode.metadata == {"a": 1}


def test_an_answer_that_was_cut_marks_its_whole_episode():
    model = Script(_2=[Answer("1", truncated=True), "0"], _1=["0"])

    played = play(Countdown(), tasks(2, 1), model)

    assert [one.episode.truncated for one in played] == [True, False]


def test_a_task_that_cannot_be_played_is_data_and_the_others_go_on():
    model = Script(_1=["0"], _2=["break"], _3=[Answer("", error="too long")])

    played = play(Countdown(), tasks("no start", 1, 2, 3), model)

    assert [one.error for one in played] == [
        "environment.py:3: no start",
        None,
        "environment.py:9: broken",
        "too long",
    ]
    assert [one.episode is None for one in played] == [True, False, True, True]


def test_an_episode_that_fails_keeps_its_conversation_so_far():
    model = Script(_2=["1", "break"], _3=[Answer("", error="too long")])

    broken, unanswered = play(Countdown(), tasks(2, 3), model)

    assert [message["content"] for message in broken.messages] == ["from 2", "1", "next", "break"]
    assert [answer.text for answer in broken.answers] == ["1", "break"]
    assert [message["content"] for message in unanswered.messages] == ["from 3"]
    assert (broken.opening, unanswered.opening) == (1, 1)


def test_the_opening_is_the_environments_even_with_examples_of_answers_in_it():
    class Shown(Countdown):
        def start(self, task):
            example = {"role": "assistant", "content": "0"}
            return [*super().start(task), example, {"role": "user", "content": "now you"}]

    (one,) = play(Shown(), tasks(1), Script(_1=["0"]))

    assert one.opening == 3
    assert one.messages == one.episode.messages


@pytest.mark.parametrize("given", ["hello", {"content": "no role"}, {"role": 3}, None])
def test_what_is_no_message_is_the_environments_fault(given):
    class Bad(Countdown):
        def start(self, task):
            return [given] if task.data == 1 else super().start(task)

        def step(self, task, messages, action):
            return Step(done=False, messages=(given,))

    first, second = play(Bad(), tasks(1, 2), Script(_2=["1"]))

    assert first.error == f"the environment's start gave {given!r}, which is no message with a role"
    assert second.error == f"the environment's step gave {given!r}, which is no message with a role"
    assert [message["content"] for message in second.messages] == ["from 2", "1"]


def test_no_tasks_ask_nothing():
    model = Script()

    assert play(Countdown(), [], model) == []
    assert model.asked == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ("", "plain")),
        (" spaces stay \n", ("", " spaces stay \n")),
        ("<think>a</think>b", ("a", "b")),
        ("\n<think>\na\n</think>\n\nb\n", ("a", "b")),
        ("<think></think>b", ("", "b")),
        ("<think>never closed", ("never closed", "")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("the tag <think> is text here", ("", "the tag <think> is text here")),
        ("", ("", "")),
    ],
)
def test_split_thinking(text, expected):
    assert split_thinking(text) == expected


def test_an_environment_that_never_ends_is_bounded_by_its_turns():
    (one,) = play(Countdown(), tasks(2), Script(_2=["7", "8", "9"]))

    assert one.episode.completion == "9"
    assert [answer.text for answer in one.answers] == ["7", "8", "9"]


def test_an_episode_without_room_for_a_turn_ends_with_the_one_before():
    (one,) = play(Countdown(), tasks(2), Script(_2=["1", Answer("", full=True)]))

    assert one.episode.truncated
    assert one.episode.completion == "1"
    assert [answer.text for answer in one.answers] == ["1"]


def test_an_episode_that_is_open_for_too_long_ends_with_the_turn_before():
    played = play(Countdown(), tasks(2, 1), Script(_2=["1"], _1=["0"]), timeout_s=0)

    assert [one.episode.completion for one in played] == ["1", "0"]
    assert [one.episode.truncated for one in played] == [True, False]


class Hanging(Countdown):
    """Takes its time where the task says so."""

    def start(self, task):
        if task.data == "start":
            time.sleep(60)
        return super().start(task)

    def step(self, task, messages, action):
        if action == "hang":
            time.sleep(60)
        return super().step(task, messages, action)


def test_an_environment_that_hangs_loses_its_episode_and_the_others_go_on():
    model = Script(_1=["0"], _2=["hang"])

    played = play(Hanging(), tasks("start", 1, 2), model, timeout_s=0.05)

    assert [one.error for one in played] == [
        "the environment's start took longer than 0.05 s",
        None,
        "the environment's step took longer than 0.05 s",
    ]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (ValueError("no"), "the environment's step raised ValueError: no"),
        (SystemExit(3), "the environment's step raised SystemExit: 3"),
        (None, "the environment's step returned a NoneType, not a Step"),
    ],
)
def test_a_step_that_breaks_its_contract_loses_its_episode(answer, error):
    class Broken(Countdown):
        def step(self, task, messages, action):
            if isinstance(answer, BaseException):
                raise answer
            return answer

    (one,) = play(Broken(), tasks(1), Script(_1=["0"]))

    assert one.error == error


def test_a_number_of_turns_that_is_none_loses_the_episode():
    class Endless(Countdown):
        def max_turns(self, task):
            return None

    (one,) = play(Endless(), tasks(1), Script())

    assert one.error.startswith("the environment's start raised TypeError")


def test_the_end_of_each_episode_is_told_as_soon_as_it_is_there():
    told = []
    model = Script(_1=["0"], _2=["1", "0"])

    def over(place, one):
        told.append((place, one.episode is not None, len(model.asked)))

    play(Countdown(), tasks(2, 1, "no start"), model, over=over)

    assert told == [(2, False, 0), (1, True, 1), (0, True, 2)]


def test_every_episode_and_turn_has_a_stream_of_its_own_that_the_seed_decides():
    def streams(seed):
        model = Script(_2=["1", "0", "1", "0"])
        play(Countdown(), tasks(2, 2), model, seed=seed)
        return [question.stream for questions in model.asked for question in questions]

    assert len(set(streams(1))) == 4
    assert streams(1) == streams(1)
    assert not set(streams(1)) & set(streams(2))
