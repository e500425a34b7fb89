import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash.episodes import split_thinking
from flash.gateway.reasoning import CLOSE, OPEN, Splitter, split

PIECES = st.sampled_from(
    [OPEN, CLOSE, "<", "</", "think", ">", "<thi", "</thin", "nk>", " ", "\n", "a", "b c", "\u00a0"]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40)


def in_pieces(text, cuts, *, opened):
    splitter = Splitter(opened=opened)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    given_out = [splitter.feed(text[a:b]) for a, b in itertools.pairwise(places)]
    given_out.append(splitter.end())
    return tuple("".join(part) for part in zip(*given_out, strict=True))


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 60), max_size=12))
@example("<think>a</think>b", list(range(18)))
@example(" \n<think>\n a </thi nk </think>\n\n b \n", list(range(40)))
def test_any_cutting_of_any_text_is_split_as_training_splits_it(text, cuts):
    assert in_pieces(text, cuts, opened=False) == split_thinking(text)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 60), max_size=12))
@example("a</think>b", list(range(11)))
def test_a_text_whose_prompt_opened_the_trace_is_inside_it_from_the_start(text, cuts):
    begins = text.lstrip().startswith(OPEN)
    assert in_pieces(text, cuts, opened=True) == split_thinking(text if begins else OPEN + text)


def test_an_answer_without_a_trace_comes_as_the_model_wrote_it():
    assert split("  4 < 5 \n", opened=False) == ("", "  4 < 5 \n")


def test_what_is_sure_is_given_out_at_once():
    splitter = Splitter(opened=False)
    assert splitter.feed("<think>so ") == ("so", "")
    assert splitter.feed("it is </thi") == (" it is", "")
    assert splitter.feed("nk>\n4") == ("", "4")
