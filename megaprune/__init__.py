"""megaprune: learned layer pruning and healing of large language models on Megatron-Core."""

__version__ = "0.1.0"
