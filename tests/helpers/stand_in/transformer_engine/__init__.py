"""Stand-in for Transformer Engine: its modules on plain torch, with the real package's names, shapes and attributes.

Megatron-Core's own extension runs on it, on any device, if `tests/helpers/stand_in` is on the path. It proves what
needs values: losses through the core's spec for Transformer Engine, and checkpoints. Names and shapes are compared with
the real package by `tests/te`.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.20.2"
