"""What a save does to the disk, and what a disk can do to a save."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sft_job.checkpoint.folder import published
from sft_job.checkpoint.manifest import damage
from sft_job.contract import RunFolder
from tests.chaos.faults import STEPS, Bench, FileCall, flip_bits, kill_at_each_call, size_of, tmpfs
from tests.chaos.oracle import differences
from tests.chaos.shim import Act, Op
from tests.chaos.world import Arm

pytestmark = pytest.mark.slow

# Each kill is a run: the whole list takes minutes, and is gone through by `make chaos`.
STRIDE = int(os.environ.get("CHAOS_STRIDE", "29"))
FLIPS = 200


def test_a_kill_at_any_file_call_of_a_save_is_gone_on_from(bench: Bench, tmp_path: Path) -> None:
    kills, faults = kill_at_each_call(bench, tmp_path, STRIDE)
    assert not faults, "\n".join(faults)
    assert kills * STRIDE > 60, "two saves make fewer calls than they should: is the shim in the way?"


@pytest.fixture(scope="module")
def traced(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[FileCall]]:
    folder = tmp_path_factory.mktemp("traced")
    return RunFolder(folder / "sft"), bench.traced(folder)


def test_every_byte_is_durable_before_its_name_is(traced) -> None:
    """Files and folders are fsynced after their last write and before the rename that publishes them."""
    run, calls = traced
    last = run.step(STEPS)
    clean: set[Path] = set()
    at_publication: set[Path] = set()
    for call in calls:
        if call.op is Op.WRITE:
            clean.discard(call.path)
        elif call.op is Op.FSYNC:
            clean.add(call.path)
        elif call.op is Op.RENAME:
            clean = {_after(path, call) for path in clean}
            if call.path == last:
                at_publication = set(clean)
    files = [path for path in last.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not {str(path.relative_to(last)) for path in files if path not in at_publication}, "not durable"
    assert {last, *(path for path in last.rglob("*") if path.is_dir())} <= at_publication


def test_every_name_is_durable_before_the_next_one_says_so(traced) -> None:
    """The folder is fsynced between a checkpoint's rename and that of latest, and after it."""
    run, calls = traced
    shown = [call for call in calls if run.checkpoints in (call.path.parent, call.path)]
    waiting: list[str] = []
    for call in shown:
        if call.op is Op.FSYNC and call.path == run.checkpoints:
            waiting = []
        elif call.op is Op.RENAME and not call.path.name.startswith("."):
            assert not waiting, f"{waiting} not durable when {call.path.name} gets its name"
            waiting = [call.path.name]
    assert not waiting
    latest = [call for call in shown if call.path.name in (run.latest.name, f".{run.latest.name}.tmp")]
    assert [call.op for call in latest] == 2 * [Op.WRITE, Op.FSYNC, Op.RENAME]


def _after(path: Path, rename: FileCall) -> Path:
    assert rename.source is not None
    return rename.path / path.relative_to(rename.source) if path.is_relative_to(rename.source) else path


def test_latest_moves_after_the_checkpoint_has_its_name(traced) -> None:
    run, calls = traced
    renames = [call.path for call in calls if call.op is Op.RENAME and call.path.parent == run.checkpoints]
    shown = [path for path in renames if path == run.latest or path.name.startswith("global_step_")]
    assert [path.name for path in shown] == ["global_step_2", "latest", "global_step_4", "latest"]


def test_the_pointer_is_never_written_in_place(traced) -> None:
    run, calls = traced
    assert not [call.path for call in calls if call.op is Op.WRITE and call.path in (run.latest, run.final)]
    assert len([call for call in calls if call.op is Op.RENAME and call.path == run.latest]) == 2


def test_no_flipped_bit_is_loaded(traced) -> None:
    run, _ = traced
    checkpoint = published(run)[-1]
    assert damage(checkpoint) is None
    caught, silent = flip_bits(checkpoint, FLIPS, seed=1)
    assert not silent, silent
    assert caught > 0.9 * FLIPS
    assert damage(checkpoint) is None


@pytest.fixture(scope="module")
def stopped(bench: Bench, tmp_path_factory: pytest.TempPathFactory):
    """A run that was killed after its first checkpoint, and one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    assert bench.start(folder / "whole").code == 0
    root = folder / "killed" / "sft" / "checkpoints"
    killed = bench.start(folder / "killed", arm=Arm(2, Op.WRITE, root, f"global_step_{STEPS}/", Act.STRIKE))
    assert killed.code == 137
    assert [path.name for path in published(RunFolder(folder / "killed" / "sft"))] == ["global_step_2"]
    return bench.evidence(folder / "whole"), folder / "killed"


def on_tmpfs(source: Path, folder: Path) -> RunFolder:
    """The killed run's files in a folder whose checkpoints/ is a file system of its own."""
    shutil.copytree(source / "control", folder / "control")
    shutil.copytree(source / "sft", folder / "sft", symlinks=True, dirs_exist_ok=True)
    return RunFolder(folder / "sft")


def test_a_full_disk_at_each_tenth_of_a_save(bench: Bench, tmp_path: Path, stopped) -> None:
    reference, killed = stopped
    save = size_of(killed.parent / "whole" / "sft" / "checkpoints" / f"global_step_{STEPS}")
    folder = tmp_path / "run"
    try:
        with tmpfs(folder / "sft" / "checkpoints", 4 * save):
            run = on_tmpfs(killed, folder)
            ballast = run.checkpoints / "ballast"
            for tenth in range(10):
                _fill(run, ballast, save * tenth // 10)
                ended = bench.start(folder, 1 + tenth)
                assert ended.code == 73, f"{tenth} tenths free: {ended.code}\n{ended.output}"
                assert "Traceback" not in ended.output
                steps = published(run)
                assert steps[0].name == "global_step_2"
                assert all(damage(path) is None for path in steps)
            ballast.unlink()
            ended = bench.start(folder, 20)
            assert ended.code == 0, ended.output
            assert differences(reference, bench.evidence(folder), exact=True) == []
    except PermissionError as error:
        pytest.skip(f"needs root to mount a small file system: {error}")


def test_a_disk_that_fills_up_during_a_save(bench: Bench, tmp_path: Path, stopped) -> None:
    """From one of its writes on, each tenth of them in turn, a save is told that there is no space left."""
    reference, killed = stopped
    folder = tmp_path / "run"
    shutil.copytree(killed, folder, symlinks=True)
    run = RunFolder(folder / "sft")
    writes = sum(call.op is Op.WRITE for call in bench.traced(tmp_path / "traced")) // 2
    for number, first in enumerate(range(0, writes, max(1, writes // 10)), start=1):
        full = Arm(3, Op.WRITE, run.checkpoints, f"global_step_{STEPS}/", Act.FAIL, skip=first, value=errno.ENOSPC)
        ended = bench.start(folder, number, full)
        assert ended.code == 73, f"full from write {first} on: {ended.code}\n{ended.output}"
        assert "Traceback" not in ended.output
        assert [path.name for path in published(run)] == ["global_step_2"]
        assert damage(published(run)[0]) is None
    ended = bench.start(folder, 99)
    assert ended.code == 0, ended.output
    assert differences(reference, bench.evidence(folder), exact=True) == []


def test_a_slow_disk_is_waited_for(bench: Bench, tmp_path: Path) -> None:
    """Saves of rank 0 that take longer than ranks wait for each other end no run."""
    folder = tmp_path / "run"
    slow = Arm(0, Op.FSYNC, folder / "sft" / "checkpoints", "", Act.DELAY, value=800_000)
    ended = bench.start(folder, 0, slow, more=["trainer.timeout_seconds=3"], world=2)
    assert ended.code == 0, ended.output
    assert ended.seconds > 10, "the disk was not slow"
    (last,) = published(RunFolder(folder / "sft"))
    assert damage(last) is None


def _fill(run: RunFolder, ballast: Path, free: int) -> None:
    """Leave ``free`` bytes on the file system of checkpoints/."""
    ballast.unlink(missing_ok=True)
    there = shutil.disk_usage(run.checkpoints).free
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, there - free))


def test_a_read_only_disk(bench: Bench, tmp_path: Path, stopped) -> None:
    reference, killed = stopped
    folder = tmp_path / "run"
    try:
        with tmpfs(folder / "sft" / "checkpoints", 64 << 20):
            run = on_tmpfs(killed, folder)
            subprocess.run(["mount", "-o", "remount,ro", str(run.checkpoints)], check=True)
            ended = bench.start(folder, 1)
            assert ended.code == 73, ended.output
            assert "Read-only file system" in ended.output
            assert "Traceback" not in ended.output
            subprocess.run(["mount", "-o", "remount,rw", str(run.checkpoints)], check=True)
            assert bench.start(folder, 2).code == 0
            assert differences(reference, bench.evidence(folder), exact=True) == []
    except PermissionError as error:
        pytest.skip(f"needs root to mount a small file system: {error}")
