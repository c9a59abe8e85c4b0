"""Models and tokenizers by name: a folder, or an id on the Hugging Face Hub."""

import os
import re
import socket
from fnmatch import fnmatch
from pathlib import Path

from megaprune.utils.errors import MegapruneError
from megaprune.utils.rank0 import on_each_node, on_rank0_for_all, together

# Pickles, other frameworks' weights and the original layout of weights that are there in Hugging Face's as well.
_UNREAD = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# As the hub checks ids: owner and name, of letters, digits, '-', '_' and '.', none of the last three at an end.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![-.])", re.ASCII)


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name. A folder of this name takes precedence: check for it first."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".git")


def resolve_hf_model(
    name: str, config_only: bool = False, flag: str = "--hf-model", tokenizer_only: bool = False
) -> Path:
    """Return the folder that a flag names: the folder itself, or the download of a Hub id. A name is an id only if no
    folder with exactly this path exists.

    Args:
        config_only: only config.json is needed.
        tokenizer_only: everything except the weights is needed.

    Raises:
        MegapruneError: there is neither a folder nor a model of this name, or a file of the folder is a broken link.
    """
    folder = Path(name)
    if not folder.is_dir():
        # No supported family has models without an owner, but tokenizers of such models are used.
        if not looks_like_hub_id(name if "/" in name or not tokenizer_only else f"owner/{name}"):
            raise MegapruneError(f"{flag} {name} {_state(folder)}: give an HF model folder or a hub id (owner/name)")
        folder = _download(name, config_only, tokenizer_only, flag)
    check_links(folder, config_only, tokenizer_only)
    return folder


def shared_hf_model(name: str, flag: str = "--hf-model") -> Path:
    """Return the folder that a flag names, as `resolve_hf_model`, with one download on each node. Collective.

    Raises:
        MegapruneError: as `resolve_hf_model`; or a node does not see the folder, or got another revision.
    """
    is_folder = on_rank0_for_all(Path(name).is_dir)

    def resolve() -> Path:
        if is_folder and not Path(name).is_dir():
            raise MegapruneError(
                f"{flag} {name} is a folder on the first node, which {socket.gethostname()} does not see: give one "
                "that all nodes share"
            )
        return resolve_hf_model(name, flag=flag)

    folder = on_each_node(resolve)
    revision = on_rank0_for_all(lambda: folder.name)

    def checked() -> Path:
        if folder.name != revision:
            raise MegapruneError(
                f"{flag} {name} is revision {folder.name} on {socket.gethostname()} and {revision} on the first node: "
                "download it again, or give a folder that all nodes share"
            )
        return folder

    return together(checked)


def _download(name: str, config_only: bool, tokenizer_only: bool, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    if config_only:
        wanted, unwanted = ["config.json"], None
    else:
        wanted, unwanted = None, [*_UNREAD, *(_WEIGHTS if tokenizer_only else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # no network, no such model or no access; the Hub's own message says which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        here = "is not a folder" if _state(Path(name)) == "does not exist" else f"{_state(Path(name))} here"
        raise MegapruneError(f"{flag} {name} {here}, and the hub does not provide it: {reason}") from None


def _state(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist"
    return "is not a folder" if path.exists() else "does not exist"


def check_links(folder: Path, config_only: bool = False, tokenizer_only: bool = False) -> None:
    """Refuse a folder in which a file that would be read is a broken link, as in a Hub cache without its blobs.

    Raises:
        MegapruneError: a link is broken; the message names it.
    """
    unread = [*_UNREAD, ".*", *(_WEIGHTS if tokenizer_only else ())]
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name == "config.json" or not (config_only or any(fnmatch(path.name, each) for each in unread)):
            check_link(path)


def check_link(path: Path, name: str | None = None) -> None:
    """Refuse a broken link.

    Args:
        name: the name of the path in the message.

    Raises:
        MegapruneError: the path is a broken link.
    """
    if path.is_symlink() and not path.exists():
        raise MegapruneError(
            f"{name or path} is a link to {os.readlink(path)}, which does not exist (a hub cache that was cleaned, or "
            "copied without its blobs?): download it again"
        )
