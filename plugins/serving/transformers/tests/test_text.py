"""Text as it comes: whatever the tokens, what was said is a beginning of what will be said."""

import pytest
from flash_serving_transformers.text import Detokenizer, StopWatch
from hypothesis import given
from hypothesis import strategies as st

WORDS = st.text(st.sampled_from("ab <é漢🙂"), max_size=12)


def byte_decode(tokens):
    return bytes(tokens).decode(errors="replace")


def fallback_decode(tokens):
    """As tokenizers that write a character as bytes: one bad byte spoils the row it is in."""
    raw = bytes(tokens)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(raw)


def stripping_decode(tokens):
    """As tokenizers that begin every text without its space."""
    return byte_decode(tokens).removeprefix(" ")


def said(text, stops=()):
    """Feed a text's bytes one by one; return each thing that was said, and the watch."""
    text_of, watch = Detokenizer(byte_decode), StopWatch(stops)
    pieces = []
    for byte in text.encode():
        pieces.append(watch.add(text_of.add(byte)))
        if watch.found:
            return pieces, watch
    pieces.append(watch.add(text_of.end()))
    return [*pieces, watch.end()], watch


@pytest.mark.slow
@pytest.mark.parametrize("decode", [byte_decode, stripping_decode], ids=lambda one: one.__name__)
@given(text=WORDS)
def test_the_pieces_of_a_text_are_the_text_and_no_piece_has_half_a_character(decode, text):
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert detokenizer.end() == ""
    assert decode(text.encode()) == "".join(pieces)


@pytest.mark.slow
@given(st.lists(st.sampled_from(["漢", "é", "🙂"]), max_size=6))
def test_characters_that_spoil_one_another_while_unfinished_come_whole(characters):
    detokenizer = Detokenizer(fallback_decode)
    pieces = [detokenizer.add(byte) for byte in "".join(characters).encode()]
    assert characters == [piece for piece in pieces if piece]


@pytest.mark.slow
@given(st.binary(max_size=40))
def test_bytes_that_are_no_characters_come_as_a_whole_decoder_writes_them(raw):
    detokenizer = Detokenizer(byte_decode)
    pieces = [detokenizer.add(byte) for byte in raw]
    assert byte_decode(raw) == "".join(pieces) + detokenizer.end()


def test_a_character_that_is_never_finished_is_said_at_the_end():
    detokenizer = Detokenizer(byte_decode)
    assert [detokenizer.add(byte) for byte in "a漢".encode()[:-1]] == ["a", "", ""]
    assert detokenizer.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.slow
@given(text=WORDS, stops=st.lists(st.text(st.sampled_from("ab <é"), min_size=1, max_size=3)))
def test_a_text_is_cut_before_its_first_stop_sequence_however_it_is_split(text, stops):
    pieces, watch = said(text, stops)
    # Of the sequences that the text has by the time one is complete, the first to begin counts.
    ends = [at + len(one) for one in stops if (at := text.find(one)) >= 0]
    seen = text[: min(ends, default=len(text))]
    cut = min([len(seen), *(at for one in stops if (at := seen.find(one)) >= 0)])
    assert (text[:cut], bool(ends)) == ("".join(pieces), watch.found)


@pytest.mark.slow
@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=3))
def test_what_is_held_back_is_never_more_than_could_begin_a_stop_sequence(pieces, stops):
    watch = StopWatch(stops)
    released = ""
    for count, piece in enumerate(pieces, 1):
        released += watch.add(piece)
        if watch.found:
            return
        held = "".join(pieces[:count])[len(released) :]
        assert held == "" or any(one.startswith(held) for one in stops)


def test_a_stop_sequence_over_two_tokens_is_not_said_in_part():
    watch = StopWatch(["\n\nUser:"])
    assert [watch.add(piece) for piece in ("Hi", ".\n", "\n", "Us", "er: no")] == [
        "Hi",
        ".",
        "",
        "",
        "",
    ]
    assert watch.found


def test_what_only_looked_like_a_stop_sequence_is_said():
    watch = StopWatch(["END"])
    assert [watch.add("the E"), watch.add("N"), watch.add("Z"), watch.add("EN"), watch.end()] == [
        "the ",
        "",
        "ENZ",
        "",
        "EN",
    ]
