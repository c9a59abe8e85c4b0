"""The verb `generate-data`: text or chats written by the model itself."""

from collections.abc import Sequence

from megaprune import api
from megaprune.cli.parser import parse_flags
from megaprune.config.generation import GenerateConfig

_DESCRIPTION = (
    "Let a model continue texts, or answer chats, and write the result as rows for --train-data: calibration and "
    "recovery then see what the model itself would say."
)


def run(argv: Sequence[str], command: str = "") -> None:
    """Write the rows, and print their number and the speed.

    Raises:
        MegapruneError: the model or the prompts can't be used.
        UsageError: a flag is wrong.
    """
    [config] = parse_flags(argv, [GenerateConfig], "generate_data.py", _DESCRIPTION)
    made = api.generate_data(**vars(config))
    speed = f" in {made.seconds:,.1f} s ({made.tokens_per_second:,.0f} tokens/s)" if made.tokens_per_second else ""
    print(
        f"{made.output}: {made.samples:,} rows, {made.new_tokens:,} tokens by the model{speed}; "
        f"{made.cut:,} rows were cut at --max-new-tokens",
        flush=True,
    )
