"""The verb `push`: a pruned model to the Hugging Face Hub."""

from collections.abc import Sequence

from megaprune import api
from megaprune.cli.parser import parse_flags
from megaprune.config.push import PushConfig

_DESCRIPTION = "Push a pruned model and its card to the Hugging Face Hub, in one commit."


def run(argv: Sequence[str], command: str = "") -> None:
    """Push the model, and print what was sent; with --dry-run, what would be sent.

    Raises:
        MegapruneError: the folder holds no complete model with a card, or the hub refuses it.
        UsageError: a flag is wrong.
    """
    [config] = parse_flags(argv, [PushConfig], "push.py", _DESCRIPTION, recipes=False)
    pushed = api.push(**vars(config))
    if config.dry_run:
        print(pushed.card)
    rows = [*pushed.files.items(), *((name, "is deleted") for name in pushed.deleted)]
    width = max(len(name) for name, _ in rows)
    for name, size in rows:
        print(f"  {name:<{width}}  {size if isinstance(size, str) else f'{size:,} bytes'}")
    for note in pushed.notes:
        print(f"note: {note}")
    print(f"dry run: nothing was sent to {pushed.url}" if config.dry_run else f"pushed to {pushed.url}")
