"""The built-in methods, a module each. All modules here are imported to list the methods: one more file adds a method.

Modules import torch, and what needs it, in their functions, so that `--help` does not wait for it.
"""
