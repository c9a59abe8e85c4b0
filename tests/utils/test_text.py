"""Text for people."""

import pytest

from megaprune.utils.text import number_ranges


@pytest.mark.parametrize(
    "numbers, shown", [([3, 1, 2, 9, 11, 12], "1-3, 9, 11-12"), ([], "none"), ([7], "7"), (range(3), "0-2")]
)
def test_number_ranges(numbers, shown):
    assert number_ranges(numbers) == shown


def test_number_ranges_without_spaces():
    assert number_ranges([0, 1, 2, 5], ",") == "0-2,5"
