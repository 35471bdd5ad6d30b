from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.data.faults import Fault, RowFault
from sft_job.data.fit import Turns, count_turns, fit, most_characters, without_oldest_turns
from sft_job.data.render import Rendered

ROLES = ["system", "developer", "user", "assistant", "tool"]
CONVERSATIONS = st.lists(st.sampled_from(ROLES), max_size=12).map(
    lambda roles: [{"role": role, "content": str(index)} for index, role in enumerate(roles)]
)


def shape(messages: list[Any]) -> str:
    return "".join(message["role"][0] for message in messages)


def conversation(shape: str) -> list[dict[str, str]]:
    names = {role[0]: role for role in ROLES}
    return [{"role": names[letter], "content": str(index)} for index, letter in enumerate(shape)]


def row(length: int) -> Rendered:
    return Rendered(list(range(length)), ((1, length),))


@pytest.mark.parametrize(
    ("before", "turns", "after_one"),
    [
        ("suaua", 2, "sua"),
        ("uata", 1, ""),
        ("suatauau", 3, "suau"),
        ("aua", 2, "ua"),  # it begins with an assistant's turn
        ("suadua", 2, "sdua"),  # a later instruction stays
        ("uuaua", 3, "uaua"),
        ("s", 0, "s"),
    ],
)
def test_a_turn_begins_with_a_users_message(before: str, turns: int, after_one: str) -> None:
    messages = conversation(before)
    assert count_turns(messages) == turns
    assert shape(without_oldest_turns(messages, 1)) == after_one


@given(CONVERSATIONS, st.integers(0, 12), st.integers(0, 12))
def test_leaving_out_turns_adds_up_and_keeps_instructions(messages: list[Any], first: int, more: int) -> None:
    left = without_oldest_turns(messages, first)
    assert without_oldest_turns(left, more) == without_oldest_turns(messages, first + more)
    assert count_turns(left) == max(0, count_turns(messages) - first)
    assert [m for m in left if m["role"] in ("system", "developer")] == [
        m for m in messages if m["role"] in ("system", "developer")
    ]
    assert left == [message for message in messages if message in left]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), st.integers(1, 200))
def test_as_few_turns_as_it_takes_are_left_out(lengths: list[int], limit: int) -> None:
    rendered: list[int] = []

    def render(count: int) -> Rendered:
        assert 0 < count < len(lengths)
        rendered.append(count)
        return row(sum(lengths[count:]))

    fitting = fit(row(sum(lengths)), limit, "turn", Turns(len(lengths), render))
    best = next((sum(lengths[n:]) for n in range(len(lengths)) if sum(lengths[n:]) <= limit), None)
    assert (None if fitting is None else len(fitting.ids)) == best
    assert len(rendered) == len(set(rendered)) <= len(lengths).bit_length()


def test_ways_to_fit() -> None:
    long = row(10)
    assert fit(long, 10, "error") is long
    assert fit(long, 4, "error") is None
    assert fit(long, 4, "drop") is None
    assert fit(long, 4, "turn") is None  # no turns to leave out
    assert fit(long, 4, "left") == Rendered([6, 7, 8, 9], ((0, 4),))
    assert fit(long, 4, "right") == Rendered([0, 1, 2, 3], ((1, 4),))


def test_a_conversation_that_cannot_be_rendered_shorter() -> None:
    def render(count: int) -> Rendered:
        raise RowFault(Fault.NOT_RENDERED, "roles must alternate")

    with pytest.raises(RowFault, match="roles must alternate"):
        fit(row(10), 4, "turn", Turns(3, render))


def test_the_longest_text_that_is_tokenised() -> None:
    vocabulary = ["a", "abcd" * 64]
    assert most_characters(vocabulary, 10, "error") == 1 << 20
    assert most_characters(vocabulary, 1 << 20, "turn") == 256 << 20
    assert most_characters(vocabulary, 10, "left") is None
