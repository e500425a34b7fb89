"""A conversation in a real terminal, with a server that says what the test wants."""

import itertools
import json
import re
import sys

import pytest
from chat_server import Server, chunk, streamed
from terminal import Terminal

START = """
import sys
from flash.cli.chat_session import Conversation, Session
from flash.streaming import Reply
from flash.values import Address

url, = sys.argv[1:]
ask = lambda said: Reply(Address(url, "key"), {"model": "tiny", "messages": list(said)})
Session(Conversation(ask, {"model": "tiny"})).run()
print("LEFT")
"""


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def terminal(server, place):
    """One session for the module: each test leaves it at a prompt with nothing said."""
    terminal = Terminal([sys.executable, "-c", START, server.url], place)
    terminal.wait("> ")
    yield terminal
    terminal.line("/exit", until="LEFT")
    assert terminal.ended() == 0


@pytest.fixture
def chat(server, terminal):
    """Return what types a line and returns what is shown, and takes what the server says to it."""
    server.requests.clear()

    def chat(text, *events):
        server.answer = lambda _: (200, streamed(*events), {})
        return terminal.line(text)

    yield chat
    terminal.line("/reset")
    terminal.line("/system")


def said_to(server):
    return [[(m["role"], m["content"]) for m in body["messages"]] for _, _, body in server.requests]


def test_each_message_goes_with_all_that_was_said_before_it(server, chat):
    first = chat("hello", chunk("Good "), chunk("day", "stop"))
    chat("and you?", chunk("fine", "stop"))

    assert first.endswith("hello\nGood day\n")
    assert said_to(server) == [
        [("user", "hello")],
        [("user", "hello"), ("assistant", "Good day"), ("user", "and you?")],
    ]


def test_reasoning_is_dimmed_and_apart_and_not_said_again(server, chat):
    shown = chat("why?", chunk(reasoning_content="let me see"), chunk("so", "stop"))
    chat("oh", chunk("yes", "stop"))

    assert "\x1b[2mthinking: \x1b[0m\x1b[2mlet me see\x1b[0m\n\nso\n" in shown
    assert said_to(server)[1] == [("user", "why?"), ("assistant", "so"), ("user", "oh")]


def test_what_the_model_says_cannot_act_on_the_terminal(chat):
    shown = chat("go", chunk("\x1b]0;title\x07\x1b[2J\rover\u202e", "stop"))

    assert "\\x1b]0;title\\x07\\x1b[2J\\rover\\u202e\n" in shown
    assert "\x1b[2J" not in shown


def test_a_system_message_comes_first_until_it_is_taken_away(server, chat):
    chat("/system Be brief.")
    chat("one", chunk("1", "stop"))
    chat("/reset")
    chat("two", chunk("2", "stop"))
    chat("/system")
    chat("three", chunk("3", "stop"))

    assert said_to(server) == [
        [("system", "Be brief."), ("user", "one")],
        [("system", "Be brief."), ("user", "two")],
        [("user", "two"), ("assistant", "2"), ("user", "three")],
    ]


def test_a_slash_is_said_by_two_and_an_unknown_command_says_nothing(server, chat):
    close, far = chat("/sytem x"), chat("/quux")
    chat("//etc", chunk("ok", "stop"))

    assert 'there is no /sytem; did you mean "/system"?\n' in close
    assert "there is no /quux; /help lists what there is\n" in far
    assert said_to(server) == [[("user", "/etc")]]


def test_help_lists_every_command(chat):
    shown = chat("/help")

    assert all(word in shown for word in ("/system TEXT", "/reset", "/save FILE", "/exit"))


def test_save_writes_the_conversation_for_its_owner_alone(chat, place):
    chat("/system Be kind.")
    chat("hi", chunk(reasoning_content="hm"), chunk("hello ü", "stop"))
    shown = chat("/save talk.json")

    saved = place / "talk.json"
    assert "saved to talk.json" in shown
    assert saved.stat().st_mode & 0o777 == 0o600
    assert json.loads(saved.read_text()) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello ü", "reasoning_content": "hm"},
        ],
    }


def test_save_overwrites_only_what_it_is_told_to(chat, terminal, place):
    kept = place / "kept"
    kept.write_text("mine")
    for answer, wanted in (("n", "mine"), ("", "mine"), ("y", '{\n  "model": "tiny",\n  "mess')):
        terminal.line("/save kept", until="overwrite it? [y/N] ")
        chat(answer)
        assert kept.read_text()[:27] == wanted[:27]


@pytest.mark.parametrize(("where", "said"), [("no/where", "no folder"), ("", "/save FILE")])
def test_save_says_what_is_wrong_and_the_session_goes_on(chat, where, said):
    assert said in chat(f"/save {where}")


def test_an_error_is_told_and_its_message_can_be_said_again(server, chat, terminal):
    server.answer = lambda _: (429, {"error": {"message": "too many requests"}}, {})
    shown = terminal.line("again")
    chat("again", chunk("now", "stop"))

    assert "error:" in shown
    assert "too many requests" in shown
    assert said_to(server)[1] == [("user", "again")]


def test_an_answer_that_was_cut_is_said_to_be(chat):
    assert "cut after 3 tokens: --max-tokens" in chat("more", chunk("and", "length"))


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said_of_it(server, chat, terminal):
    server.left.clear()
    song = itertools.chain.from_iterable(streamed(chunk("la "), done=False) for _ in iter(int, 1))
    server.answer = lambda _: (200, song, {})
    terminal.type("sing\n")
    terminal.wait("la la ")
    terminal.type("\x03")
    terminal.wait("stopped\n> ")
    chat("go on", chunk("ok", "stop"))

    assert server.left.wait(10)
    [_, (_, heard), _] = said_to(server)[1]
    assert re.fullmatch("(la )+", heard)


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_ctrl_c_and_ctrl_d_leave_at_the_prompt(server, place, key):
    terminal = Terminal([sys.executable, "-c", START, server.url], place)
    terminal.wait("> ")
    terminal.wait_asleep()
    terminal.type(key)
    terminal.wait("LEFT")

    assert terminal.ended() == 0


def test_a_line_is_edited_and_had_back(chat, terminal, server):
    chat("one two", chunk("a", "stop"))
    terminal.type("\x1b[A")
    terminal.wait("one two")
    terminal.type("\x17three")
    chat("", chunk("b", "stop"))

    assert said_to(server)[1][-1] == ("user", "one three")
