"""Adapters on Megatron-Core. Only this package and `device` import megatron."""

from megaprune import device
from megaprune.mcore.requirements import check_core

check_core()
device.prepare_megatron()
