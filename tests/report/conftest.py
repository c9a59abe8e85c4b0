import pytest

from megaprune.models.sizes import Inventory, Size
from megaprune.report.run_report import build_report


@pytest.fixture
def report():
    return build_report(
        method="e3",
        num_source_layers=8,
        kept_layers=[7, 0, 1, 2, 5],
        scores=[0.5] * 8,
        before=Inventory(Size(8_000_000, 8_000_000), dense_layers=8, moe_layers=0),
        after=Inventory(Size(5_600_000, 5_600_000), dense_layers=5, moe_layers=0),
        tokens_seen=1_228_800,
        seed=1234,
        stages={"search": {"seconds": 1.25, "tokens": 122_880}, "recovery": {"seconds": 9.0, "tokens": 1_105_920}},
        valid={"teacher": {"loss": 2.0}, "pruned": {"loss": 3.5}, "recovered": {"loss": 2.25}},
        seq_length=256,
    )
