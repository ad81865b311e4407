"""Page tokens continue where they were given, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services import pages
from services.errors import InvalidPageToken

# What a message of protobuf can hold: no lone surrogates.
texts = st.text(st.characters(codec="utf-8"), max_size=20)
keys = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
positions = st.lists(keys | st.integers(), max_size=4)


@given(positions, texts)
def test_a_token_gives_its_position_back(position: list[str | int], scope: str) -> None:
    assert pages.decode(pages.encode(position, scope), scope) == position


@given(positions, texts, texts)
def test_a_token_of_another_request_is_refused(position: list[str | int], scope: str, other: str) -> None:
    if scope == other:
        return
    with pytest.raises(InvalidPageToken):
        pages.decode(pages.encode(position, scope), other)


@given(st.text(min_size=1, max_size=60))
def test_any_other_text_is_refused(token: str) -> None:
    with pytest.raises(InvalidPageToken):
        pages.decode(token, "scope")


@pytest.mark.parametrize("key", ["a\x00", "\ud800"])
def test_a_key_that_no_database_holds_is_refused(key: str) -> None:
    with pytest.raises(InvalidPageToken):
        pages.decode(pages.encode([key], "scope"), "scope")


def test_no_token_is_the_first_page() -> None:
    assert pages.decode("", "scope") is None
