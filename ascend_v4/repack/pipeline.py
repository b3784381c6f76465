"""A repack from plan to manifest: parts written side by side, each whole and synced before it is noted.

A killed run leaves whole parts, perhaps one temporary file per thread, and a journal of what is whole. The
same command then goes on from there and ends with the bytes of a run that was never interrupted: nothing that
is written depends on time, threads or how often it was begun.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.convert import ConversionRun, Scratch
from ascend_v4.repack.files import hash_bytes, hash_file, remove_partials, write_atomically, write_error
from ascend_v4.repack.job import Job, plan_job
from ascend_v4.repack.journal import JOURNAL_FILE, Journal, PartRecord
from ascend_v4.repack.layouts import Part
from ascend_v4.repack.lock import LOCK_FILE, OutputLock
from ascend_v4.repack.manifest import MANIFEST_FILE, FileEntry, Manifest
from ascend_v4.repack.report import RepackReport, Sums, output_totals, sums_of, weight_outcomes
from ascend_v4.repack.writer import Pulse, StageSeconds, StoppedError, WrittenPart, write_part

OnBytes = Callable[[int], None]


def run_repack(
    config: RepackConfig,
    *,
    on_plan: Callable[[Job], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> RepackReport:
    """Repack a checkpoint, or go on with one that was interrupted, and say what became of it.

    `on_plan` hears what will be written before anything is; `on_bytes` the bytes of every piece written or
    found whole, from several threads.

    Raises CheckpointError for a source that is damaged or changes, an output in use or of another plan, a
    disk that is too small or fails; ConfigError for options that do not go together. Whole parts stay for the
    next run.
    """
    started = time.perf_counter()
    job = plan_job(config)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(config.output, error) from error
    with OutputLock(config.output) as lock:
        _require_ours(job)
        remove_partials(config.output)
        journal = Journal.open(config.output, job.identity())
        try:
            _require_space(job, journal)
            if on_plan is not None:
                on_plan(job)
            run = _Run(job, journal, on_bytes or _ignore)
            records = run.write_parts()
            manifest = _finish(job, records)
        except BaseException:
            # whatever stopped it: the journal stays for the run that goes on
            journal.close()
            raise
        # a run that begins between these two finds every part whole and writes the same documents again
        lock.remove_name()
        journal.remove()
    return RepackReport(
        output=config.output,
        manifest=manifest,
        plan=job.plan,
        num_parts=len(job.parts),
        resumed_parts=run.num_resumed,
        part_bytes=job.part_bytes,
        written_bytes=run.written_bytes,
        seconds=time.perf_counter() - started,
        stages=run.stages,
        operators=job.table,
    )


def part_chunks(
    job: Job, part: Part, scratch: Scratch, statistics: list[Sums | None]
) -> Iterator[memoryview]:
    """The bytes of a part front to back; a chunk is valid until the next.

    `statistics` gets the sums of each conversion as it ends, in the order of the part.
    """
    yield memoryview(part.header)
    last_use = {placed.conversion_index: place for place, placed in enumerate(part.tensors)}
    runs: dict[int, ConversionRun] = {}
    sums: dict[int, Sums | None] = {}
    for index, members in groupby(enumerate(part.tensors), key=lambda entry: entry[1].conversion_index):
        for place, placed in members:
            if index not in runs:
                _prefetch_next(job, part, index)
                runs[index] = ConversionRun(part.conversions[index], job.stored, job.table, scratch)
            made_bytes = 0
            for chunk in runs[index].chunks(placed.output):
                made_bytes += len(chunk)
                yield chunk
            assert made_bytes == placed.num_bytes, (
                f"{placed.output.name}: {made_bytes} bytes made, {placed.num_bytes} planned"
            )
            if last_use[index] == place:
                done = runs.pop(index)
                done.release()
                sums[index] = sums_of(done.stats)
    statistics += [sums[index] for index in range(len(part.conversions))]


def _prefetch_next(job: Job, part: Part, index: int) -> None:
    if index + 1 < len(part.conversions):
        job.stored.prefetch(source.name for source in part.conversions[index + 1].sources)


@contextmanager
def _torch_threads_shared(workers: int) -> Iterator[int]:
    """Threads that torch may use in each worker; afterwards as many as before in every new thread.

    Were each to use all, the smallest of its operators would wait for cores that other workers hold.
    """
    before = torch.get_num_threads()
    try:
        yield max(1, before // workers)
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class _Run:
    """The threads of one run: workers take whole parts, one more thread syncs and renames behind them."""

    job: Job
    journal: Journal
    on_bytes: OnBytes
    written_bytes: int = 0
    num_resumed: int = 0
    stages: StageSeconds = field(default_factory=StageSeconds)
    _records: dict[str, PartRecord] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None
    """The first; what other threads say after it follows from it."""

    def write_parts(self) -> dict[str, PartRecord]:
        """Every part whole on the disk; returns their records in the order of the plan."""
        todo = iter(self.job.parts)
        num_threads = self.job.num_threads
        # parts that are written and not yet synced are what a kill loses
        ahead = threading.Semaphore(num_threads)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="repack-sync") as syncer,
            _torch_threads_shared(num_threads) as each,
            ThreadPoolExecutor(
                num_threads, "repack", initializer=torch.set_num_threads, initargs=(each,)
            ) as workers,
        ):
            try:
                for future in [workers.submit(self._work, todo, syncer, ahead) for _ in range(num_threads)]:
                    future.result()
            except BaseException:
                # an interrupt of the main thread: the others give up at their next chunk
                self._stop.set()
                raise
        if self._failure is not None:
            raise self._failure
        self.job.stamps.require_unchanged()
        return {part.file_name: self._records[part.file_name] for part in self.job.parts}

    def _work(self, todo: Iterator[Part], syncer: ThreadPoolExecutor, ahead: threading.Semaphore) -> None:
        scratch = Scratch()
        with self._noting_failure():
            while not self._stop.is_set():
                with self._lock:
                    part = next(todo, None)
                if part is None:
                    return
                if self._keep(part):
                    continue
                statistics: list[Sums | None] = []
                written = self._write(part, scratch, statistics)
                ahead.acquire()
                syncer.submit(self._publish, part, written, statistics, ahead)

    def _keep(self, part: Part) -> bool:
        """Whether an earlier run left this part whole; its bytes are read again, a journal is only a "
        "claim."""
        record = self.journal.finished.get(part.file_name)
        path = self.job.config.output / part.file_name
        try:
            if record is None or path.stat().st_size != part.num_bytes or hash_file(path) != record.xxh3_128:
                return False
        except OSError:
            # missing or unreadable: written anew, and an error that lasts shows then
            return False
        with self._lock:
            self._records[part.file_name] = record
            self.num_resumed += 1
        self.on_bytes(part.num_bytes)
        return True

    def _write(self, part: Part, scratch: Scratch, statistics: list[Sums | None]) -> WrittenPart:
        chunks = part_chunks(self.job, part, scratch, statistics)
        path = self.job.config.output / part.file_name
        written = write_part(path, chunks, pulse=Pulse(self._stop, self.on_bytes))
        try:
            read = (source.name for item in part.conversions for source in item.sources)
            self.job.stored.require_unchanged(read)
        except CheckpointError:
            written.discard()
            raise
        return written

    def _publish(
        self,
        part: Part,
        written: WrittenPart,
        statistics: list[Sums | None],
        ahead: threading.Semaphore,
    ) -> None:
        with self._noting_failure():
            try:
                if self._stop.is_set():
                    written.discard()
                    return
                written.publish()
                record = PartRecord(part.file_name, written.num_bytes, written.xxh3_128, tuple(statistics))
                self.journal.add(record)
            finally:
                ahead.release()
            with self._lock:
                self._records[part.file_name] = record
                self.written_bytes += written.num_bytes
                self.stages.add(written.seconds)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except StoppedError:
            return
        except BaseException as error:
            # whatever it is, it ends the run: write_parts raises it once every thread has come to rest
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()


def _ignore(num_bytes: int) -> None:
    """No one listens."""


def _require_ours(job: Job) -> None:
    """Refuse a directory with anything in it that an interrupted run of this command did not leave."""
    output = job.config.output
    source = job.config.source.resolve()
    if output.resolve() in (source, *source.parents):
        raise CheckpointError(f"{output} is or holds the source. Name a new directory.")
    names = {path.name for path in output.iterdir()}
    if MANIFEST_FILE in names and JOURNAL_FILE not in names:
        raise CheckpointError(
            f"{output} holds a finished repack. Check it with ascend-v4 repack --verify {output}, or name a "
            "new directory."
        )
    foreign = sorted(names - {LOCK_FILE, JOURNAL_FILE})
    if foreign and JOURNAL_FILE not in names:
        raise CheckpointError(
            f"{output} is not empty: it has {', '.join(foreign[:3])}. Name a new directory, or remove this "
            "one first."
        )


def _require_space(job: Job, journal: Journal) -> None:
    """Refuse to begin what cannot end: everything that is still to be written must fit."""
    output = job.config.output
    there = sum(
        part.num_bytes
        for part in job.parts
        if part.file_name in journal.finished and (output / part.file_name).exists()
    )
    free_bytes = shutil.disk_usage(output).free
    needed_bytes = job.disk_bytes - there
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{output} has {free_bytes} bytes free and {needed_bytes} are still to be written. Free space, "
            "or name a directory on a larger disk."
        )


def _finish(job: Job, records: dict[str, PartRecord]) -> Manifest:
    """Write what describes the parts, the manifest last."""
    output = job.config.output
    contents = dict(job.documents)
    contents |= {name: job.copied_bytes(name) for name, _ in job.copied}
    files = {name: FileEntry(record.num_bytes, record.xxh3_128) for name, record in records.items()}
    try:
        for name, content in contents.items():
            write_atomically(output / name, content)
            files[name] = FileEntry(len(content), hash_bytes(content))
        outcomes = weight_outcomes(job.parts, {name: record.statistics for name, record in records.items()})
        manifest = Manifest(
            options=job.options,
            source=job.stamps.facts(),
            files=files,
            totals=output_totals(job.plan, files, outcomes),
            tensors={name: outcome.summary() for name, outcome in outcomes.items()},
        )
        write_atomically(output / MANIFEST_FILE, manifest.render())
    except OSError as error:
        raise write_error(output, error) from error
    return manifest
