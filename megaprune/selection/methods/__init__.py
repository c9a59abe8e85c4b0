"""Built-in methods, one module each. All modules in this folder are imported, so a new file adds a method.

Modules import torch, and modules that need torch, inside their functions, so that `--help` does not wait for them.
"""
