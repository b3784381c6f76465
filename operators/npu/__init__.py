"""Adapters from the contracts to torch_npu and the vendors' operator packages.

Every call is `torch.ops.<namespace>.<name>`; see docs/adr/0008-ascend-path.md.
"""
