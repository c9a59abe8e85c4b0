"""Transformer layers, and parts of layers, for Megatron-Core models."""

import torch


def mark(parameter: torch.nn.Parameter, **attributes: bool) -> None:
    """Set attributes by which Megatron-Core recognizes kinds of parameters, for example `sequence_parallel`."""
    for name, value in attributes.items():
        setattr(parameter, name, value)
