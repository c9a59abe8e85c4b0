"""Adapters on Megatron-Core. Only this package and `device` import megatron."""

from megaprune import device

device.prepare_megatron()
