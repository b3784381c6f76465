"""Implementations for CUDA devices. None are faster than the references yet, which run there as they are."""
