"""Text that messages and reports contain."""

from megaprune.utils.text import number_ranges


def test_number_ranges():
    assert number_ranges([3, 1, 2, 9, 11, 12]) == "1-3, 9, 11-12"
    assert number_ranges(range(2), ",") == "0-1" and number_ranges([0, 2, 3], ",") == "0,2-3"
    assert number_ranges([]) == "none"
