"""What a row may say, and how a mistake in one is told."""

from __future__ import annotations

import json

import pytest
from flash_env_jsonl.rows import find_splits, read_rows

from flash.api import EnvironmentFault


def said(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def read(tmp_path):
    """Write rows, given as objects or as raw lines, and read them."""

    def read(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return read_rows(path)

    return read


@pytest.mark.parametrize("asks", ["input", "prompt"])
@pytest.mark.parametrize("answers", ["output", "answer", "target"])
def test_a_text_is_the_user_s_message_and_its_answer_the_assistant_s(read, asks, answers):
    (row,) = read({asks: "2+2?", answers: "4"})

    assert row.input == "2+2?"
    assert row.opening == (said("user", "2+2?"),)
    assert row.target == (said("assistant", "4"),)


def test_a_system_text_comes_first(read):
    (row,) = read({"system": "Be brief.", "input": "Hi"})

    assert row.opening == (said("system", "Be brief."), said("user", "Hi"))
    assert row.target is None


@pytest.mark.parametrize("asks", ["prompt", "messages"])
def test_messages_open_the_episode_and_a_last_answer_is_the_gold_one(read, asks):
    talk = [said("user", "Hi"), said("assistant", "Hello"), said("user", "2+2?")]
    (row,) = read({asks: [*talk, said("assistant", "4")]})

    assert row.opening == tuple(talk)
    assert row.target == (said("assistant", "4"),)
    assert row.input == "2+2?"


def test_a_gold_continuation_may_be_messages_and_a_number(read):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    tooled, number = read(
        {"input": "weather?", "output": [call, said("tool", "rain"), said("assistant", "Rain.")]},
        {"input": "6*7?", "answer": 42},
    )

    assert [message["role"] for message in tooled.target] == ["assistant", "tool", "assistant"]
    assert number.target == (said("assistant", "42"),)


def test_ids_are_the_row_s_own_or_its_number(read):
    rows = read({"input": "a", "id": "first"}, "", {"input": "b"}, {"input": "c", "id": 17})

    assert [row.id for row in rows] == ["first", "2", "17"]


def test_columns_that_flash_does_not_know_are_metadata(read):
    (row,) = read({"input": "a", "source": "web", "metadata": {"level": 3}})

    assert row.metadata == {"source": "web", "level": 3}


def test_tools_are_the_row_s(read):
    tool = {"type": "function", "function": {"name": "look_up"}}
    with_tool, without = read({"input": "a", "tools": [tool]}, {"input": "b", "tools": []})

    assert with_tool.tools == [tool]
    assert without.tools is None


def test_a_line_separator_inside_a_text_ends_no_row(read):
    (row,) = read('{"input": "one\u2028two"}')

    assert row.input == "one\u2028two"


def test_a_character_may_be_written_as_its_two_halves(read):
    (row,) = read('{"input": "\\ud83d\\ude00"}')

    assert row.input == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"input": "a"', "2: invalid JSON at column 14"),
        ("[1, 2]", "2: a row must be an object, got a list"),
        (
            '{"input": "a", "input": "b"}',
            '2: JSON that cannot be read: the key "input" stands twice',
        ),
        ('{"input": "a", "output": NaN}', "2: JSON that cannot be read: NaN is not JSON"),
        ('{"input": "a\\ud800"}', "2: \\ud800 is half of a character"),
        ({"messages": [said("user", ["a"])]}, "2: messages: the content of message 1 has a part"),
        ("[" * 100_000, "2: JSON that cannot be read"),
        ({"output": "4"}, "2: the row asks nothing (it has output)"),
        ({}, "2: the row asks nothing (it has no keys)"),
        ({"input": "a", "prompt": "b"}, "2: the row has input and prompt, which mean the same"),
        ({"input": "a", "output": "b", "answer": "c"}, "2: the row has output and answer"),
        ({"input": "a", "ouput": "b"}, '2: unknown key "ouput"; did you mean "output"?'),
        ({"input": " "}, "2: input must be a text that is not empty, got an empty text"),
        ({"input": 3}, "2: input must be a text that is not empty, got a number"),
        ({"messages": "a"}, "2: messages must be a list of messages, got a text"),
        ({"messages": []}, "2: messages is empty"),
        ({"messages": [said("robot", "a")]}, "2: messages: message 1 has no role of system"),
        ({"messages": [said("user", None)]}, "2: messages: the content of message 1 is null"),
        ({"messages": [said("assistant", "a")]}, "2: messages has only an answer"),
        (
            {"messages": [said("user", "a"), said("assistant", "b")], "output": "c"},
            "2: the messages end with an answer, and output is another",
        ),
        ({"messages": [said("system", "a")], "system": "b"}, "2: the row has a system key and"),
        ({"input": "a", "system": 1}, "2: system must be a text, got a number"),
        ({"input": "a", "output": {"b": 1}}, "2: output must be a text, a number or a list of"),
        ({"input": "a", "output": True}, "2: output must be a text, a number or a list of"),
        ({"input": "a", "output": [said("user", "b")]}, "2: output begins with a message of user"),
        ({"input": "a", "id": 1.5}, "2: id must be a text or a whole number, got a number"),
        ({"input": "a", "id": "1"}, '2: the id "1" is taken by'),
        ({"input": "a", "metadata": [1]}, "2: metadata must be an object, got a list"),
        ({"input": "a", "tools": {"a": 1}}, "2: tools must be a list of objects"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_what_is_wrong(read, tmp_path, row, says):
    with pytest.raises(EnvironmentFault) as caught:
        read({"input": "fine"}, row)

    assert caught.value.message.startswith(f"{tmp_path}/train.jsonl:{says}")


def test_a_file_without_rows_is_refused(read):
    with pytest.raises(EnvironmentFault, match="no rows"):
        read("", "  ")


def test_bytes_that_are_not_utf_8_are_told_with_their_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"input": "a"}\n{"input": "\xe9"}\n')

    with pytest.raises(EnvironmentFault, match=r"train\.jsonl:2: not UTF-8: byte 0xe9"):
        read_rows(path)


def test_splits_are_the_files_of_dataset_or_else_of_the_folder(tmp_path):
    for name in ("train.jsonl", "notes.txt", "_draft.jsonl"):
        (tmp_path / name).touch()
    assert list(find_splits(tmp_path)) == ["train"]

    (tmp_path / "dataset").mkdir()
    for name in ("test", "train", "dev"):
        (tmp_path / "dataset" / f"{name}.jsonl").touch()
    assert list(find_splits(tmp_path)) == ["train", "dev", "test"]
    assert find_splits(tmp_path)["train"] == tmp_path / "dataset" / "train.jsonl"
