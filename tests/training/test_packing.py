"""The layout of packed rows: who sees what, and how much is computed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from flash.training.packing import IGNORED, Document, Group, Row, one_by_one, pack


def document(tokens: list[int], trained: list[bool]) -> Document:
    return Document(
        tokens, [token if train else IGNORED for token, train in zip(tokens, trained, strict=True)]
    )


@st.composite
def documents(draw) -> list[Document]:
    """Documents over few tokens, many with a common opening, some trained nowhere."""
    opening = draw(st.lists(st.integers(0, 2), max_size=20))
    made = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.sampled_from([opening, opening[:10], []])) + draw(
            st.lists(st.integers(0, 3), min_size=1, max_size=12)
        )
        trained = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        made.append(document(tokens, trained))
    return made


def seen(row: Row) -> list[tuple[tuple[int, ...], int]]:
    """What each source of a row may see, itself last, and the token it is to predict."""
    tokens = row.tokens_BN[0].tolist()
    positions = row.positions_BN[0].tolist()
    before: list[list[int]] = []
    start = 0
    for group in row.segments.groups:
        prefix = list(range(start, start + group.prefix))
        before += [prefix[: at + 1] for at in range(group.prefix)]
        start += group.prefix
        for length in group.branches:
            before += [[*prefix, *range(start, start + at + 1)] for at in range(length)]
            start += length
    assert start == len(tokens)
    assert all(positions[at] == len(visible) - 1 for at, visible in enumerate(before))
    return [
        (tuple(tokens[at] for at in before[source]), target)
        for source, target in zip(row.sources_K.tolist(), row.targets_K.tolist(), strict=True)
    ]


def wanted(made: list[Document]) -> Counter[tuple[tuple[int, ...], int]]:
    return Counter(
        (tuple(one.tokens[: at + 1]), one.tokens[at + 1]) for one in made for at in one.sources
    )


@given(documents(), st.integers(1, 60))
def test_every_trained_token_is_predicted_from_its_own_document_and_all_of_it(made, budget):
    rows = pack(made, budget=budget)

    assert Counter(one for row in rows for one in seen(row)) == wanted(made)


@given(documents(), st.integers(1, 60))
def test_rows_keep_to_the_budget_but_for_a_document_that_is_longer(made, budget):
    for row in pack(made, budget=budget):
        alone = len(row.segments.groups) == 1 and len(row.segments.groups[0].branches) == 1

        assert row.tokens_BN.shape[1] <= budget or alone


@given(documents())
def test_sharing_never_takes_more_tokens(made):
    shared, apart = (
        sum(row.tokens_BN.shape[1] for row in pack(made, budget=10_000, share=share))
        for share in (True, False)
    )

    assert shared <= apart
    assert apart == sum(len(one.inputs) for one in made)


@given(documents())
def test_one_by_one_is_a_row_a_document(made):
    rows = one_by_one(made)

    assert [row.tokens_BN[0].tolist() for row in rows] == [
        list(one.inputs) for one in made if one.sources
    ]
    assert Counter(one for row in rows for one in seen(row)) == wanted(made)


def test_a_common_opening_is_in_the_row_once_and_each_group_has_its_own():
    first, second = list(range(100, 130)), list(range(200, 220))
    made = [
        document([*opening, *ending], [False] * len(opening) + [True] * len(ending))
        for opening, ending in [
            (first, [1, 2, 3]),
            (second, [4, 5]),
            (first, [6, 7]),
            (second, [8, 9, 10]),
            ([50], [11]),
        ]
    ]
    (row,) = pack(made, budget=1000)

    # What follows a document's last source is not needed, so each lacks its last token.
    assert row.segments.groups == (Group(0, (1,)), Group(30, (2, 1)), Group(20, (1, 2)))
    assert row.tokens_BN.shape[1] == 1 + 33 + 23
    assert row.tokens == 33 + 22 + 32 + 23 + 2


def test_a_document_trained_nowhere_is_left_out():
    assert pack([document([1, 2, 3], [True, False, False])], budget=10) == []
