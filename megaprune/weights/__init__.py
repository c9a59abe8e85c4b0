"""Weights between HF folders and Megatron's shards. Reads the tables of `megaprune.models` and never builds a model."""
