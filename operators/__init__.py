"""What each computation means and who can run it.

Ships as `ascend_v4.operators`; the files live in the repository's top-level `operators/` folder.
"""
