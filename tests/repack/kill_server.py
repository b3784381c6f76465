"""A process that repacks in forked children and kills them at a chosen system call or moment.

Reads one JSON object per line from stdin: source, output, and `calls` (how many writes, syncs, opens, renames
to allow), `seconds`, or neither. Answers each with the child's exit status. Forking saves the import of torch
for every kill; syncs are only counted, since a kill takes nothing back from the system.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ascend_v4.operators.select import select
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target, load_recipe, model_parts
from tests.repack.packs import config_of

CALLS = ("write", "fsync", "rename", "open", "unlink", "ftruncate", "mkdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(allowed: int) -> None:
    """Let so many calls pass, from all threads together, and die in the next one."""
    lock = threading.Lock()
    passed = 0

    def guarded(name: str):
        real = getattr(os, name)

        def call(*arguments, **options):
            nonlocal passed
            with lock:
                passed += 1
                if passed > allowed:
                    if name == "write":
                        # the system may take any part of a write before a kill
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    die()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, guarded(name))


def child(order: dict) -> None:
    setattr(os, "fsync", lambda descriptor: None)  # noqa: B010 - mypy has os.fsync as a constant
    if order.get("calls") is not None:
        kill_at(order["calls"])
    run_repack(config_of(Path(order["source"]), Path(order["output"]), Target.W8A8, max_part_bytes=1 << 17))


def main() -> None:
    # loaded once here instead of in every child
    select("cpu")
    model_parts()
    load_recipe(Target.W8A8)
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            status = 1
            try:
                child(order)
                status = 0
            finally:
                # not sys.exit: the parent's buffers and handlers are not this process's to run
                os._exit(status)
        if order.get("seconds") is not None:
            time.sleep(order["seconds"])
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
