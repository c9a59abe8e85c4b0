"""Packages that Megatron-Core needs and does not declare: one line instead of a traceback from its import."""

import importlib.util
from importlib.metadata import PackageNotFoundError

import pytest

from megaprune.mcore import requirements
from megaprune.utils.errors import MegapruneError


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes packages look installed, by their versions, and all others absent."""

    def install(**versions):
        found = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            if name not in found:
                raise PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(requirements, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in found else None)

    return install


@pytest.mark.parametrize(
    "packages, said",
    [
        (dict(megatron_core="0.15.3"), "megatron-core 0.15.3 is installed, and 0.16.1 or newer is needed"),
        (dict(megatron_core="0.18.0rc1"), "megatron-core 0.18.0rc1 needs the package triton"),
        (dict(megatron_core="0.19.2"), "megatron-core 0.19.2 needs the package triton"),
        (
            dict(megatron_core="0.17.1", nvidia_resiliency_ext="0.4.1"),
            "megatron-core 0.17.1 does not work beside nvidia-resiliency-ext 0.4.1: install 0.6.0 or newer of it",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(installed, packages, said):
    installed(**packages)
    with pytest.raises(MegapruneError) as refusal:
        requirements.check_core()
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    "packages",
    [
        dict(megatron_core="0.16.1"),
        dict(megatron_core="0.16.1", nvidia_resiliency_ext="0.4.1"),
        dict(megatron_core="0.17.1"),
        dict(megatron_core="0.17.1", nvidia_resiliency_ext="0.6.0"),
        dict(megatron_core="0.19.2", triton="3.7.1"),
        dict(megatron_core="0.19.2", triton="3.7.1", nvidia_resiliency_ext="0.7.0"),
        dict(),
    ],
)
def test_what_fits_together_is_accepted(installed, packages):
    installed(**packages)
    requirements.check_core()


def test_the_installed_packages_fit_together():
    requirements.check_core()
