"""Operator contracts: one file per family; the signature is the schema, the body the reference in plain
torch.
"""
