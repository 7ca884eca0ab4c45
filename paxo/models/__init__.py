"""Llama-family decoders in Flax NNX, seen from outside as `Policy` records."""
