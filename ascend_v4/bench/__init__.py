"""Benchmarks: this engine beside its peer, in one run on one machine."""
