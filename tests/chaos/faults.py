"""Faults of the file system, one start at a time: every call of a save, a full or read-only disk, flipped bits."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sft_job.checkpoint.folder import published
from sft_job.checkpoint.manifest import MANIFEST, damage
from sft_job.contract import RunFolder
from tests.chaos.inputs import SEED_YAML, run_overrides
from tests.chaos.oracle import Evidence, differences, gather
from tests.chaos.plan import Shape
from tests.chaos.server import Server
from tests.chaos.shim import Act, Op
from tests.chaos.world import JOURNAL, SEEN, Arm, End, Start, run_start, strikes_done

FULL = Shape(lora=False, ulysses=1, accumulation=1, worlds=(2, 2))
STEPS = 4
FILE_CALLS = Op.WRITE | Op.FSYNC | Op.RENAME
# Two saves with the removal of the first between them, the second with the export and the link to the end.
_SHORT = (f"trainer.total_training_steps={STEPS}", "trainer.max_ckpt_to_keep=1")


@dataclass(frozen=True)
class FileCall:
    """One call that changed the disk; ``source`` is a rename's old name, as the caller gave it."""

    op: Op
    path: Path
    source: Path | None


@dataclass(frozen=True)
class Bench:
    """Where a short run on one rank is disturbed."""

    server: Server
    inputs: Path

    def start(
        self, folder: Path, number: int = 0, arm: Arm | None = None, more: Sequence[str] = (), world: int = 1
    ) -> End:
        """One start of the run in ``folder``."""
        overrides = (*run_overrides(self.inputs, FULL, world), *_SHORT, *more)
        environ = {"CHECKPOINT_DIR": str(folder), "SFT_JOB_ID": folder.name}
        start = Start(SEED_YAML, overrides, environ, folder / "control", number, world, arm=arm)
        return self.server.call(run_start, start, timeout=start.hang_seconds + 30)

    def evidence(self, folder: Path) -> Evidence:
        """What the finished run left."""
        return self.server.call(gather, folder / "sft", folder / "control")

    def traced(self, folder: Path) -> list[FileCall]:
        """Write, fsync, rename and unlink calls below checkpoints/ of an undisturbed run, from its second step on."""
        root = folder / "sft" / "checkpoints"
        ended = self.start(folder, arm=Arm(2, FILE_CALLS | Op.UNLINK, root, "", Act.TRACE))
        assert ended.code == 0, ended.output
        lines = [line.split("\t") for line in (folder / "control" / JOURNAL).read_text().splitlines()]
        return [FileCall(Op(int(op)), Path(path), Path(source) if source else None) for op, path, source in lines]


def count_calls(bench: Bench, folder: Path) -> tuple[int, Evidence]:
    """Write, fsync and rename calls below checkpoints/ from the second step on, and the run that was not killed."""
    root = folder / "sft" / "checkpoints"
    ended = bench.start(folder, arm=Arm(2, FILE_CALLS, root, "", Act.COUNT))
    assert ended.code == 0, ended.output
    return int((folder / "control" / SEEN).read_text()), bench.evidence(folder)


def kill_at_call(bench: Bench, folder: Path, number: int, reference: Evidence) -> list[str] | None:
    """Kill a run at its n-th call (a write leaves half), start it again; what differs from the reference.

    None where this run made fewer calls: saves run beside the training, so that the count differs by a few.
    """
    root = folder / "sft" / "checkpoints"
    killed = bench.start(folder, 0, Arm(2, FILE_CALLS, root, "", Act.STRIKE, skip=number))
    place = strikes_done(folder / "control").get(0)
    if place is None and killed.code == 0:
        return None
    if place is None or killed.code != 137:
        return [f"call {number}: ended with {killed.code}, struck at {place}: {killed.output[-500:]}"]
    half = [path.name for path in published(RunFolder(folder / "sft")) if damage(path)]
    faults = [f"call {number} ({place}): half a checkpoint is published: {half}"] if half else []
    again = bench.start(folder, 1)
    if again.code != 0:
        return [*faults, f"call {number} ({place}): the next start ended with {again.code}: {again.output[-1500:]}"]
    found = differences(reference, bench.evidence(folder), exact=True)
    faults += [f"call {number} ({place}): {line}" for line in found]
    if not faults:
        shutil.rmtree(folder)
    return faults


def kill_at_each_call(bench: Bench, folder: Path, stride: int = 1, jobs: int = 2) -> tuple[int, list[str]]:
    """Kill at every ``stride``-th call of two saves; how many kills there were, and what was wrong."""
    calls, reference = count_calls(bench, folder / "reference")
    numbers = range(0, calls, stride)
    with ThreadPoolExecutor(jobs) as pool:
        answers = pool.map(lambda n: kill_at_call(bench, folder / f"call_{n}", n, reference), numbers)
        found = [answer for answer in answers if answer is not None]
        return len(found), [line for lines in found for line in lines]


def flip_bits(checkpoint: Path, flips: int, seed: int) -> tuple[int, list[str]]:
    """Flip one random bit after the other, over all files alike, and take each back.

    Returns:
        How many the manifest's proof caught, and a line for each that it did not although a file's content differs.
    """
    draw = random.Random(seed)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    caught, silent = 0, []
    for _ in range(flips):
        path = draw.choice(files)
        bit = draw.randrange(8 * path.stat().st_size)
        with _flipped(path, bit):
            found = damage(checkpoint)
        caught += found is not None
        # In the manifest itself a bit may change nothing that it says of the files, which are as they were.
        if found is None and path.name != MANIFEST:
            silent.append(f"{path.relative_to(checkpoint)}: bit {bit}")
    return caught, silent


@contextlib.contextmanager
def _flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file flipped, for as long as the block lasts."""
    old = path.read_bytes()
    new = bytearray(old)
    new[bit // 8] ^= 1 << bit % 8
    path.write_bytes(new)
    try:
        yield
    finally:
        path.write_bytes(old)


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[None]:
    """A small file system of its own at ``folder``; needs root.

    Raises:
        PermissionError: this machine does not let this process mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip() or "mount failed")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Bytes that a folder takes in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())
