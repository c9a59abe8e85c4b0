import pytest

from megaprune.selection.selector import protected_layers
from megaprune.utils.errors import UsageError


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
