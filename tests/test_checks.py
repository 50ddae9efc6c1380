"""What is refused everywhere in the same words: numbers, and names with their shapes."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from polyak._checks import Difference, whole_within, within
from polyak.errors import OptionError


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (3, 3),
        (3.0, 3),
        (np.int64(3), 3),
        (np.float32(3), 3),
        (2**53 + 1, 2**53 + 1),
        (np.int64(2**53 + 1), 2**53 + 1),
    ],
)
def test_whole_numbers_are_taken_whatever_their_type_and_to_the_last_digit(value, read):
    found = whole_within("[1, 1e18]", "steps", value)
    assert found == read and type(found) is int


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None, True, math.nan, math.inf, 10**400, 1 + 0j])
def test_all_else_is_refused_with_the_range_and_what_was_given(value):
    with pytest.raises(OptionError) as refused:
        whole_within("[1, inf)", "steps", value)
    assert str(refused.value) == f"steps must be a whole number in [1, inf), got {value!r:.60}"


@pytest.mark.parametrize(
    ("interval", "inside", "outside"), [("[0, 1)", (0, 0.5), (-0.1, 1)), ("(0, 1]", (0.5, 1), (0, 1.1))]
)
def test_a_bracket_says_whether_the_end_belongs_to_a_range(interval, inside, outside):
    assert [within(interval, "fraction", value) for value in inside] == list(inside)
    for value in outside:
        with pytest.raises(OptionError):
            within(interval, "fraction", value)


def test_what_differs_is_said_all_at_once_and_what_may_be_anything_is_left_out():
    expected = {"a": "(2,)", "b": "(2,)", "lazy": None, "same": "(1,)"}
    found = Difference.of(expected, {"b": "(3,)", "lazy": "(9,)", "same": "(1,)", "c": "(1,)"})
    assert found and (found.missing, found.added, dict(found.changed)) == (
        ("a",),
        ("c",),
        {"b": ("(2,)", "(3,)")},
    )
    assert not Difference.of({"lazy": None}, {"lazy": "(9,)"})


def test_of_many_changes_the_first_are_named_and_the_others_counted():
    found = Difference.of(dict.fromkeys("abcdefgh", "(2,)"), dict.fromkeys("abcdefgh", "(3,)"))
    assert str(found).startswith("has 'a' as (3,), not (2,), 'b' as ")
    assert str(found).endswith("'e' as (3,), not (2,), and 3 more that differ")


def test_profiles_are_checked_without_torch():
    code = "import sys, polyak; polyak.Tail(steps=3); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
