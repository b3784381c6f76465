"""One repack at a time per output directory.

A lock file is held with flock, so the system lets go of it however the holder dies. It is removed at the end:
a finished output holds nothing of the run that made it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ascend_v4.errors import CheckpointError, DeviceError

LOCK_FILE = "repack.lock"
MAX_PID_BYTES = 32


class OutputLock:
    """Exclusive hold on an existing directory, as a context manager. Raises CheckpointError where held."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._descriptor: int | None = None
        self._has_name = False

    def __enter__(self) -> OutputLock:
        self._descriptor = self._acquire()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        self._has_name = True
        return self

    def remove_name(self) -> None:
        """Remove the file already, so that a kill after this leaves none; what follows must bear company."""
        self.path.unlink(missing_ok=True)
        self._has_name = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None, f"{self.path} was released twice"
        if self._has_name:
            # removed while still held: who opened it meanwhile sees that its name is gone, and tries again
            self.remove_name()
        os.close(self._descriptor)
        self._descriptor = None

    def _acquire(self) -> int:
        flock, exclusive = _flock()
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                flock(descriptor, exclusive)
                if _same_file(descriptor, self.path):
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, MAX_PID_BYTES, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                named = f"process {holder}" if holder.isdecimal() else "another process"
                raise CheckpointError(
                    f"{self.path.parent} is being written by {named}. Wait for it, or name another directory."
                ) from None
            except OSError as error:
                os.close(descriptor)
                raise CheckpointError(
                    f"{self.path} cannot be locked: {error}. Name a directory on a file system with locks."
                ) from None
            os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock() -> tuple[Callable[[int, int], None], int]:
    try:
        import fcntl
    except ImportError:
        raise DeviceError(
            "repack needs file locks (fcntl), which this system lacks. Run it on Linux."
        ) from None
    return fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB
