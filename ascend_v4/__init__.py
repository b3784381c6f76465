"""Ascend-first deployment toolkit for DeepSeek-V4: repack, serve, plan, diagnose, prove."""

__version__ = "0.1.0"
