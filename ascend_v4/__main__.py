"""`python -m ascend_v4` is the `ascend-v4` command."""

from __future__ import annotations

from ascend_v4.cli.main import main

if __name__ == "__main__":
    main()
