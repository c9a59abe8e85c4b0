"""Where a model is: a folder, or on the hub."""

from pathlib import Path

from megaprune.utils.errors import MegapruneError


def resolve_hf_model(name: str, config_only: bool = False) -> Path:
    """The folder of ``--hf-model``: itself, or the download of a hub id.

    Args:
        config_only: config.json is all that is wanted.

    Raises:
        MegapruneError: there is neither.
    """
    folder = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()
    if folder.is_dir() or looks_like_path:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise MegapruneError(f"--hf-model {name} {what}: give an HF model folder or a hub id (owner/name)")
        return folder
    from huggingface_hub import snapshot_download

    if config_only:
        wanted = {"allow_patterns": ["config.json"]}
    else:
        wanted = {"ignore_patterns": ["*.bin", "*.pth", "*.gguf", "original/*"]}
    try:
        # Ranks of one host share a cache, whose locks let one of them fetch while the others wait.
        return Path(snapshot_download(name, **wanted))
    except Exception as error:  # no network, no such model, no access: the hub's own word says which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MegapruneError(f"--hf-model {name} is no folder here, and the hub does not give it: {reason}") from None
