"""Checks of packages that the installed Megatron-Core needs, beyond what its own metadata declares."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from megaprune.utils.errors import MegapruneError

_LOWEST_CORE = (0, 16, 1)
# From this version on, the core imports triton at its top level, and CPU builds of torch don't install it.
_IMPORTS_TRITON = (0, 18)
# From this version on, importing the core's checkpointing fails beside an older nvidia-resiliency-ext.
_CHECKS_RESILIENCY = (0, 17)
_LOWEST_RESILIENCY = (0, 6)


def check_core() -> None:
    """Check that Megatron-Core can be imported. Must precede the first import of megatron.

    Raises:
        MegapruneError: the core is too old, or another package that it imports is missing or too old.
    """
    core = _release("megatron-core")
    if core is None:  # a source tree on the path, which has no metadata
        return
    name = f"megatron-core {version('megatron-core')}"
    if core < _LOWEST_CORE:
        raise MegapruneError(f"{name} is installed, and 0.16.1 or newer is needed: pip install -U megatron-core")
    if core >= _IMPORTS_TRITON and importlib.util.find_spec("triton") is None:
        raise MegapruneError(f"{name} needs the package triton, which is not installed: pip install triton")
    resiliency = _release("nvidia-resiliency-ext")
    if core >= _CHECKS_RESILIENCY and resiliency is not None and resiliency < _LOWEST_RESILIENCY:
        raise MegapruneError(
            f"{name} does not work beside nvidia-resiliency-ext {version('nvidia-resiliency-ext')}: install 0.6.0 or "
            "newer of it, or uninstall it"
        )


def _release(package: str) -> tuple[int, ...] | None:
    """Return the release number of an installed package, without the suffixes of pre-releases; None if it is not."""
    try:
        return Version(version(package)).release
    except PackageNotFoundError:
        return None
