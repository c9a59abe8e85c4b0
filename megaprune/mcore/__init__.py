"""Thin adapters on Megatron-Core: the only folder, beside `device`, that imports megatron."""

from megaprune import device

device.prepare_megatron()
