"""Runs that are interrupted, run into each other, or meet a full disk or a source that changes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.journal import JOURNAL_FILE, Journal
from ascend_v4.repack.lock import LOCK_FILE, OutputLock
from ascend_v4.repack.manifest import MANIFEST_FILE, read_manifest
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target
from tests.repack.packs import config_of, repacked, tree


class StopHereError(Exception):
    """What a test interrupts a run with."""


def stop_after(num_bytes: int):
    """A listener that interrupts once so many bytes were written."""
    seen = 0

    def hear(piece_bytes: int) -> None:
        nonlocal seen
        seen += piece_bytes
        if seen > num_bytes:
            raise StopHereError

    return hear


def interrupted(source: Path, output: Path, *, after_bytes: int = 1_200_000, **changes) -> None:
    """Leave an output begun: some parts whole, no manifest."""
    with pytest.raises(StopHereError):
        run_repack(config_of(source, output, **changes), on_bytes=stop_after(after_bytes))
    assert (output / JOURNAL_FILE).exists()
    assert not (output / MANIFEST_FILE).exists()


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    repacked(source, output)
    return tree(output)


def test_interrupted_run_goes_on_from_its_last_whole_part(source, tmp_path, whole):
    interrupted(source, tmp_path / "out")
    report = repacked(source, tmp_path / "out")
    assert 0 < report.resumed_parts < report.num_parts
    assert tree(tmp_path / "out") == whole


def test_interrupted_run_leaves_no_temporary_file(source, tmp_path):
    interrupted(source, tmp_path / "out")
    assert not [name for name in tree(tmp_path / "out") if "partial" in name]


def test_temporary_file_of_a_killed_run_is_removed(source, tmp_path, whole):
    interrupted(source, tmp_path / "out")
    (tmp_path / "out" / ".model-00003-of-00010.safetensors.partial-77").write_bytes(b"half")
    repacked(source, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_part_that_is_not_as_the_journal_says_is_written_again(source, tmp_path, whole, damage):
    interrupted(source, tmp_path / "out")
    part = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    raw = bytearray(part.read_bytes())
    raw[-5] ^= 1
    part.unlink()
    if damage != "remove":
        part.write_bytes(raw if damage == "flip" else raw[:-1])
    repacked(source, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_journal_cut_off_in_a_line_loses_only_that_line(source, tmp_path, whole, cut):
    interrupted(source, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-cut])
    repacked(source, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


def test_parts_without_a_journal_line_are_written_again(source, tmp_path, whole):
    interrupted(source, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    report = repacked(source, tmp_path / "out")
    assert report.resumed_parts == 0
    assert tree(tmp_path / "out") == whole


def test_other_options_do_not_go_on_with_a_begun_output(source, tmp_path):
    interrupted(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="target was w8a8 and is mx"):
        repacked(source, tmp_path / "out", Target.MX)


def test_changed_source_does_not_go_on_with_a_begun_output(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    interrupted(copy, tmp_path / "out")
    os.utime(next(copy.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="beginning of another repack: source was"):
        repacked(copy, tmp_path / "out")


def test_threads_may_differ_when_a_run_goes_on(source, tmp_path, whole):
    interrupted(source, tmp_path / "out", jobs=1)
    repacked(source, tmp_path / "out", jobs=3)
    assert tree(tmp_path / "out") == whole


def test_run_killed_between_manifest_and_clean_up_is_finished_by_the_next(
    source, tmp_path, whole, monkeypatch
):
    def kill(journal):
        raise StopHereError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", kill)
        with pytest.raises(StopHereError):
            repacked(source, tmp_path / "out")
    report = repacked(source, tmp_path / "out")
    assert report.resumed_parts == report.num_parts
    assert tree(tmp_path / "out") == whole


def test_finished_output_is_not_written_over(source, tmp_path):
    repacked(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a finished repack"):
        repacked(source, tmp_path / "out")


def test_directory_with_other_files_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match=r"not empty: it has thesis\.tex"):
        repacked(source, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"thesis.tex"}


def test_source_is_not_written_into(tmp_path, source):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    with pytest.raises(CheckpointError, match="is or holds the source"):
        repacked(copy, copy)
    assert set(tree(copy)) == set(tree(source))


def test_output_of_a_run_in_progress_is_refused_naming_the_process(source, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        OutputLock(tmp_path / "out"),
        pytest.raises(CheckpointError, match=f"written by process {os.getpid()}"),
    ):
        repacked(source, tmp_path / "out")


def test_lock_of_a_dead_process_does_not_hold(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).write_text("1\n")
    repacked(source, tmp_path / "out")
    assert read_manifest(tmp_path / "out").files


def test_lock_taken_over_after_its_file_was_removed_still_excludes(tmp_path):
    with OutputLock(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        with OutputLock(tmp_path), pytest.raises(CheckpointError), OutputLock(tmp_path):
            pass


def test_disk_too_small_is_refused_before_a_part_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 5000))
    with pytest.raises(CheckpointError, match="has 5000 bytes free and"):
        repacked(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_full_disk_is_a_clear_error_and_the_run_goes_on_later(source, tmp_path, whole, monkeypatch, call):
    calls = 0
    real = getattr(os, call)

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"disk is full.*same command again"):
            repacked(source, tmp_path / "out", max_part_bytes=1 << 16)
    assert not [name for name in tree(tmp_path / "out") if "partial" in name]
    repacked(source, tmp_path / "out", max_part_bytes=1 << 16)
    assert calls > 25
    assert len(tree(tmp_path / "out")) > len(whole)


def change_in_place(shard: Path) -> None:
    with shard.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\0")
    os.utime(shard, ns=(1, 1))


def replace_with_copy(shard: Path) -> None:
    shutil.copy2(shard, shard.with_suffix(".new"))
    shard.with_suffix(".new").rename(shard)


def cut_off(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize("change", [change_in_place, replace_with_copy, cut_off, Path.unlink])
@pytest.mark.parametrize("after_bytes", [0, 2_000_000])
def test_source_that_changes_under_a_run_is_named(source, tmp_path, change, after_bytes):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    seen = 0

    def hear(piece_bytes: int) -> None:
        nonlocal seen
        if seen <= after_bytes < seen + piece_bytes:
            change(shard)
        seen += piece_bytes

    with pytest.raises(CheckpointError, match=f"{shard.name} (changed|went away) while it was read"):
        run_repack(config_of(copy, tmp_path / "out", jobs=1), on_bytes=hear)
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_missing_shard_is_named_before_anything_is_written(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    sorted(copy.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"missing shard.*model-00002"):
        repacked(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_shard_is_named_before_anything_is_written(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    cut_off(sorted(copy.glob("*.safetensors"))[1])
    with pytest.raises(CheckpointError, match=r"truncated shard.*model-00002"):
        repacked(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfinished_output_is_no_source(source, tmp_path):
    interrupted(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="unfinished repack"):
        repacked(tmp_path / "out", tmp_path / "back", Target.RELEASE)


def test_every_name_is_given_only_to_synced_bytes(source, tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    rename = os.rename

    def name_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[1]

    def renamed(source_path, target_path, **directories):
        events.append(("rename", Path(source_path).name))
        rename(source_path, target_path, **directories)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(("sync", name_of(descriptor))))
    monkeypatch.setattr(os, "rename", renamed)
    repacked(source, tmp_path / "out")
    renames = [index for index, (kind, _) in enumerate(events) if kind == "rename"]
    parts = list((tmp_path / "out").glob("*.safetensors"))
    assert len(renames) == len(parts) + 4
    for index in renames:
        assert ("sync", events[index][1]) in events[:index]
        assert ("sync", "out") in events[index:]
