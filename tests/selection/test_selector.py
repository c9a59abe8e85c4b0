import pytest

from megaprune.errors import UsageError
from megaprune.selection.selector import check_num_kept, protected_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("first,last", {0, 11}),
        ("none", set()),
        (" first , last, 5 ", {0, 5, 11}),
        ("0,-1,11", {0, 11}),
        ("-12", {0}),
    ],
)
def test_protected_layers(spec, expected):
    assert protected_layers(spec, 12) == expected


@pytest.mark.parametrize("spec", ["", "middle", "first,,last", "none,first", "12", "-13", "1.5", "first last"])
def test_bad_protected_layers_name_the_flag(spec):
    with pytest.raises(UsageError, match="--protect-layers"):
        protected_layers(spec, 12)


def test_num_kept_must_fit():
    check_num_kept(12, 2, frozenset({0, 11}))
    check_num_kept(12, 12, frozenset())
    for num_kept in (0, -1, 13):
        with pytest.raises(UsageError, match="--num-layers-to-prune"):
            check_num_kept(12, num_kept, frozenset())
    with pytest.raises(UsageError, match=r"leaves 1, but --protect-layers keeps 2 \(0, 11\)"):
        check_num_kept(12, 1, frozenset({0, 11}))
