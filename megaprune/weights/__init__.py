"""Weights between HF folders and Megatron's shards. Reads the tables of `megaprune.models`; never builds a model."""
