"""CPU implementations, only where the reference is too slow. Same file names as the contracts."""
