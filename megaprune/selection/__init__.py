"""The selection of layers that stay. Pure tensors: no Megatron, no process groups.

`methods/` has a module for each method, which registers it; the algorithms stand beside it. A user registers a method
of their own with the same decorator: `@megaprune.selection.register("mine", calibrated=True)`.
"""

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, Method, find, methods, names, register

__all__ = ["Budget", "Choice", "Method", "find", "methods", "names", "register"]
