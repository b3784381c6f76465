"""The Ascend path: adapters, the simulator they run on, and the contracts with the vendors' packages."""
