"""The source's tensors as several threads read them: views of memory maps, fetched ahead, let go after."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from itertools import groupby

from torch import Tensor

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.repack.source import SourceFiles


class StoredTensors:
    """Tensors of an open checkpoint by name. Threads may share it."""

    def __init__(self, reader: CheckpointReader, files: SourceFiles) -> None:
        self._reader = reader
        self._files = files
        self._lock = threading.Lock()

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes as they lie in its file, uint8 of one axis, sharing memory with the map.

        Those of a tensor that ranks share out are joined, in memory of their own.
        """
        self.require_unchanged([name])
        with self._lock:
            return self._reader.raw_bytes(name)

    def runs_of(self, name: str) -> tuple[Tensor, ...]:
        """The same bytes in order, as views of the maps also where ranks share out rows."""
        self.require_unchanged([name])
        with self._lock:
            return self._reader.byte_runs(name)

    def files_of(self, name: str) -> tuple[str, ...]:
        """The shards that hold a tensor: one, or one per slice."""
        return tuple(place.file for place in self._reader.stored(name).places)

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Raise CheckpointError where a shard of these tensors is not what it was.

        Reading a map beyond the end of a file that was cut off kills the process, so this comes before
        reading.
        """
        self._files.require_unchanged({file: None for name in names for file in self.files_of(name)})

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are converted; only a hint."""
        if not hasattr(os, "posix_fadvise"):
            return
        places = (place for name in names for place in self._reader.stored(name).places)
        for file, ranges in groupby(places, key=lambda place: place.file):
            # what is wrong with a file is said when it is read
            with contextlib.suppress(OSError):
                descriptor = os.open(f"{self._reader.directory}{os.sep}{file}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    for place in ranges:
                        os.posix_fadvise(
                            descriptor, place.offset_bytes, place.num_bytes, os.POSIX_FADV_WILLNEED
                        )
                finally:
                    os.close(descriptor)

    def release(self, names: Iterable[str]) -> None:
        """Take the pages of consumed tensors out of this process; the page cache may keep them."""
        with self._lock:
            for name in names:
                self._reader.release(name)
