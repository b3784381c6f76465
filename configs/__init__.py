"""Model shapes and deployment recipes as data files: model/*.yaml and deploy/*.yaml.

Ships as `ascend_v4.configs`; the files live in the repository's top-level `configs/` folder.
"""
