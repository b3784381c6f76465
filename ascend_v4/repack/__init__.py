"""Repacking: what becomes what, in which files, and the pipeline that writes them."""
