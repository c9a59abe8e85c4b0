"""Which layers stay. Pure tensors: no Megatron, no process groups, no files."""
