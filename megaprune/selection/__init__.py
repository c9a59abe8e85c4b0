"""Selection of the layers that stay. Pure tensors: no Megatron, no process groups.

`methods/` contains a module for each method, which registers it; the algorithms are modules beside it. Users register
their own methods with the same decorator: `@megaprune.selection.register("mine", calibrated=True)`.
"""

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, Method, find, methods, names, register

__all__ = ["Budget", "Choice", "Method", "find", "methods", "names", "register"]
