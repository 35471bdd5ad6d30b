"""Saves beside the training: the bits of the step that asked, one error for all ranks, no hurry for a slow disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_job.checkpoint.files import Files
from sft_job.checkpoint.folder import published
from sft_job.checkpoint.state import read_state
from sft_job.contract import ExitCode, RunFolder
from tests.distributed.runs import Watched, run_job, seed_config

TOTAL = 8
PATIENCE = 60.0


def config_of(inputs: Path, run: Path, *overrides: str):
    return seed_config(
        inputs / "qwen3",
        inputs / "train.parquet",
        None,
        run,
        "ulysses_sequence_parallel_size=1",
        "data.train_batch_size=4",
        "optim.lr=1e-2",
        "model.fsdp_config.model_dtype=fp32",
        *overrides,
    )


def shards(run: Path, step: int) -> dict[str, str]:
    manifest = json.loads((run / "checkpoints" / f"global_step_{step}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}


def folders(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink())


class Held(Files):
    """Begins to write the shards of a step only when the next step is done."""

    def __init__(self) -> None:
        self.done = 0
        self.changed = threading.Condition()

    def before(self, operation: str, path: Path) -> None:
        if operation == "open" and path.suffix == ".distcp":
            step = int(path.parent.name.rpartition("_")[2])
            with self.changed:
                assert self.changed.wait_for(lambda: step == TOTAL or self.done > step, PATIENCE)

    def watch(self, job: Any) -> None:
        def note(*_: Any) -> None:
            with self.changed:
                self.done += 1
                self.changed.notify_all()

        job.optimizer.register_step_post_hook(note)


def _held(config: Any) -> Watched:
    files = Held()
    return run_job(config, files=files, prepared=files.watch)


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory, ranks) -> tuple[Watched, Path]:
    run = tmp_path_factory.mktemp("saving") / "run"
    return ranks(2, run_job, config_of(inputs, run, "trainer.save_freq=3", "trainer.async_save=false"))[0], run


@pytest.mark.parametrize("more", [[], ["model.lora_rank=4"], ["model.fsdp_config.cpu_offload=true"]])
def test_the_bits_are_those_of_the_step_that_asked(inputs, tmp_path, ranks, straight, more) -> None:
    """The weights have moved on when the shards are written; the checkpoint is that of a synchronous save."""
    run = tmp_path / "run"
    found = ranks(2, _held, config_of(inputs, run, "trainer.save_freq=3", *more))[0]
    reference, reference_run = straight
    if more:
        reference_run = tmp_path / "straight"
        options = ["trainer.save_freq=3", "trainer.async_save=false", *more]
        reference = ranks(2, run_job, config_of(inputs, reference_run, *options))[0]
    assert found.weights_sha256 == reference.weights_sha256
    assert folders(run) == ["global_step_3", "global_step_6", "global_step_8"]
    for step in (3, 6, 8):
        assert len(shards(run, step)) == 2
        assert shards(run, step) == shards(reference_run, step)
    assert len({tuple(shards(run, step).values()) for step in (3, 6, 8)}) == 3


class Full(Files):
    """The disk of one rank is full for a while."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def before(self, operation: str, path: Path) -> None:
        step = path.parent.name.rpartition("_")[2]
        if os.environ["RANK"] == "1" and operation == "write" and step.isdecimal() and int(step) in self.steps:
            raise OSError(28, "No space left on device")


def _with_full_disk(config: Any, steps: tuple[int, ...], stop_after: int | None = None) -> tuple[int, str, list[float]]:
    """Exit code, message and losses of a run."""
    from sft_job.errors import JobError

    losses: list[float] = []
    said: list[str] = []

    def watch(job: Any) -> None:
        step = job.trainer.train_step
        job.checkpointer._warn = said.append

        def stepping(batch: Any) -> Any:
            # Every save is over before the next step's end, so that what is seen where is no matter of luck.
            result = step(batch)
            losses.append(result.loss)
            flight = job.checkpointer._flight
            if flight is not None:
                flight.work.wait(PATIENCE)
            return replace(result, saves_over=2.0 if flight is not None else 0.0)

        job.trainer.train_step = stepping

    try:
        run_job(config, files=Full(steps), prepared=watch, stop_after=stop_after)
    except JobError as error:
        return int(error.code), str(error), losses
    return 0, "\n".join(said), losses


def test_an_error_on_one_rank_ends_all_at_the_same_step(inputs, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    found = ranks(2, _with_full_disk, config_of(inputs, run, "trainer.save_freq=2"), (4,))
    assert [code for code, _, _ in found] == [ExitCode.CANNOT_CREATE] * 2
    assert found[0] == found[1]
    assert len(found[0][2]) == 5  # the step after the one that asked
    assert "cannot save step 4" in found[0][1]
    assert "No space left on device" in found[0][1]
    assert "goes on from global_step_2" in found[0][1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["global_step_2", "latest"]


def test_a_run_may_go_on_without_a_checkpoint(inputs, tmp_path, ranks, straight) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.save_freq=2", "trainer.on_save_failure=continue")
    found = ranks(2, _with_full_disk, config, (4,))
    assert [code for code, _, _ in found] == [0, 0]
    assert "cannot save step 4" in found[0][1]
    assert "training goes on" in found[0][1]
    assert folders(run) == ["global_step_2", "global_step_6", "global_step_8"]
    assert shards(run, 8) == shards(straight[1], 8)


@pytest.mark.parametrize(("steps", "stop_after"), [((8,), None), ((3,), 3)])
def test_the_last_save_must_not_fail(inputs, tmp_path, ranks, steps, stop_after) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.save_freq=2", "trainer.on_save_failure=continue")
    found = ranks(2, _with_full_disk, config, steps, stop_after)
    assert [code for code, _, _ in found] == [ExitCode.CANNOT_CREATE] * 2
    assert f"cannot save step {steps[0]}" in found[0][1]


class Slow(Files):
    """Sleeps before the first publication, on rank 0 alone."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before(self, operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "global_step_1":
            time.sleep(self.seconds)


def _slow(config: Any, timeout: int) -> Watched:
    from sft_job.runtime import start_runtime

    start_runtime(timeout)
    return run_job(config, files=Slow(timeout + 1.5))


def test_a_slow_disk_trips_no_timeout(inputs, tmp_path, ranks) -> None:
    """A publication takes longer than a collective may, and the end of the run waits for it."""
    options = ["trainer.total_training_steps=2", "trainer.save_freq=1"]
    found = ranks(2, _slow, config_of(inputs, tmp_path / "run", *options), 6)
    assert [watched.step for watched in found] == [2, 2]


class Journal(Files):
    """The checkpoints that there were after each publication."""

    def __init__(self) -> None:
        self.there: list[list[str]] = []

    def before(self, operation: str, path: Path) -> None:
        if operation == "fsync" and path.name == "checkpoints":
            self.there.append(sorted(each.name for each in path.iterdir() if each.name.startswith("global")))


class DiedError(Exception):
    """As a crash of all ranks: nothing is saved on the way out."""


def _recovering(config: Any, die_in: int | None = None) -> tuple[Watched | None, list[list[str]]]:
    files = Journal()

    def watch(job: Any) -> None:
        step = job.trainer.train_step

        def stepping(batch: Any) -> Any:
            if batch.step + 1 == die_in:
                raise DiedError
            return step(batch)

        job.trainer.train_step = stepping

    try:
        return run_job(config, files=files, prepared=watch), files.there
    except DiedError:
        return None, files.there


def test_recovery_checkpoints_replace_each_other(inputs, tmp_path, ranks, straight) -> None:
    """Due all the time; a newer one is there before the old one goes; none is left at the end."""
    run = tmp_path / "run"
    options = ["trainer.recovery_minutes=1e-9", "trainer.save_freq=4", "trainer.max_ckpt_to_keep=1"]
    config = config_of(inputs, run, *options, "trainer.async_save=false")
    watched, there = ranks(2, _recovering, config)[0]
    names = [f"global_step_{step}" for step in range(1, 9)]
    published = [entry for index, entry in enumerate(there) if entry and entry not in there[:index]]
    assert [names[0]] in published
    assert names[:2] in published
    assert names[3:5] in published  # the kept one of step 4 and the recovery checkpoint of step 5
    assert all(len(entry) <= 3 for entry in there)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["final", "global_step_8", "latest"]
    assert watched.weights_sha256 == straight[0].weights_sha256


def test_a_crashed_run_goes_on_from_one(inputs, tmp_path, ranks, straight) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.recovery_minutes=1e-9", "trainer.async_save=false")
    assert ranks(2, _recovering, config, 6)[0][0] is None
    assert folders(run) == ["global_step_5"]
    assert json.loads((run / "checkpoints" / "global_step_5" / "state.json").read_text())["kept"] is False
    second = ranks(2, run_job, config)[0]
    assert len(second.losses) == 3
    assert second.weights_sha256 == straight[0].weights_sha256
    assert folders(run) == ["global_step_8"]


def test_recovery_beside_the_training(inputs, tmp_path, ranks, straight) -> None:
    """Asynchronous, with a crash somewhere: to the bit all the same."""
    run = tmp_path / "run"
    config = config_of(inputs, run, "trainer.recovery_minutes=1e-9", "trainer.save_freq=3")
    ranks(2, _recovering, config, 8)
    assert 1 <= len(folders(run)) <= 4
    second = ranks(2, run_job, config)[0]
    assert second.weights_sha256 == straight[0].weights_sha256
    assert shards(run, 8) == shards(straight[1], 8)


def test_none_by_default_in_a_short_run(inputs, tmp_path, ranks) -> None:
    _, there = ranks(1, _recovering, config_of(inputs, tmp_path / "run", "trainer.total_training_steps=3"))[0]
    assert [names for names in there if names] == [["global_step_3"]] * 2 or there[-1] == ["global_step_3"]
    assert all(names in ([], ["global_step_3"]) for names in there)


def _small(run: Path, seed: int = 0, stepped: bool = True, **options: Any) -> Any:
    """A checkpointer of a sharded linear layer."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from sft_job.checkpoint.checkpointer import Checkpointer
    from sft_job.checkpoint.policy import SavePolicy
    from sft_job.contract import RunFolder
    from sft_job.runtime import start_runtime

    if not dist.is_initialized():
        start_runtime(60)
    torch.manual_seed(seed)
    module = torch.nn.Linear(512, 700)  # 1.4 MB
    fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters())
    if stepped:
        module(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    policy = SavePolicy(frozenset({"model", "optimizer"}))
    options = {"policy": policy, "export_name": "huggingface", "export": lambda folder, meet: "0" * 64, **options}
    checkpointer = Checkpointer(RunFolder(run), module, optimizer, torch.device("cpu"), **options)
    checkpointer.prepare()
    return checkpointer


def _state(step: int) -> Any:
    from sft_job.checkpoint.state import RunState

    return RunState(step, 8, 4, 0, 4, 100, 50, 2.0, 2, 1, "d", "m", {}, True, "0")


def _fenced(run: Path) -> list[str]:
    from sft_job.checkpoint.policy import Purpose
    from sft_job.errors import JobError

    def lost() -> None:
        if len(asked) == 2:  # at the start, and before the first checkpoint
            raise JobError(ExitCode.CANNOT_CREATE, "the run folder is held by another run")
        asked.append(1)

    asked: list[int] = []
    found: list[str] = []
    checkpointer = _small(run, confirm=lost)
    checkpointer.save(_state(1), Purpose.KEPT)
    for purpose in (Purpose.RECOVERY, Purpose.STOP):
        try:
            checkpointer.save(_state(2), purpose)
            checkpointer.stop(_state(2))
        except JobError as error:
            found.append(str(error))
    return found


def test_a_run_that_lost_its_folder_publishes_nothing(tmp_path, ranks) -> None:
    found = ranks(2, _fenced, tmp_path)
    assert found == [["the run folder is held by another run"] * 2] * 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"global_step_1", "latest"}


class Cut(Files):
    """Rank 1 of a node that was cut off: it writes its shard when the next holder of the run folder publishes."""

    def __init__(self, folder: Path) -> None:
        self.go, self.done = folder / "go", folder / "done"

    @contextmanager
    def writing(self, path: Path) -> Iterator[Any]:
        late = os.environ["RANK"] == "1" and path.suffix == ".distcp"
        if late:
            wait_for(self.go)
        try:
            with super().writing(path) as stream:
                yield stream
        finally:
            if late:
                self.done.touch()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def _two_holders(run: Path, folder: Path) -> str:
    """What the old holder's save of step 2 meets, while the new one saves the same step."""
    from sft_job.checkpoint.policy import Purpose
    from sft_job.errors import JobError

    cut, lost = Cut(folder), []

    def refused() -> None:
        if lost:
            raise JobError(ExitCode.CANNOT_CREATE, "the run folder is held by another run")

    def let_the_old_one_write() -> None:
        if lost:
            cut.go.touch()
            wait_for(cut.done)

    old = _small(run, files=cut, confirm=refused, token="old")
    old.save(_state(2), Purpose.RECOVERY)
    new = _small(run, confirm=let_the_old_one_write, token=f"new{os.environ['RANK']}", seed=1)
    lost.append(1)
    new.save(_state(2), Purpose.STOP)
    try:
        old.stop(_state(3))
    except JobError as error:
        return str(error)
    return ""


def test_an_old_holder_does_not_write_into_the_new_ones_checkpoint(tmp_path, ranks) -> None:
    from sft_job.checkpoint.manifest import damage

    run = tmp_path / "run"
    found = ranks(2, _two_holders, run, tmp_path)
    assert found[0] == found[1]
    assert "held by another run" in found[0]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"global_step_2", "latest"}
    assert damage(run / "checkpoints" / "global_step_2") is None


class Patient(Files):
    """Writes no shard of the second step before the run is asked to stop."""

    def __init__(self) -> None:
        self.hurried = threading.Event()
        self.read: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        if operation == "open" and path.suffix == ".distcp" and path.parent.name.endswith("_2"):
            assert self.hurried.wait(PATIENCE)

    def read_back(self, path: Path) -> Any:
        self.read.append(path.parent.name.rpartition("_")[2])
        return super().read_back(path)


def _stopped_within_a_save(run: Path) -> tuple[list[str], list[str]]:
    from sft_job.checkpoint.policy import Purpose

    files = Patient()
    checkpointer = _small(run, files=files)
    files.hurried = checkpointer._writing._hurry
    checkpointer.save(_state(1), Purpose.RECOVERY)
    checkpointer._flight.work.wait(PATIENCE)
    checkpointer.save(_state(2), Purpose.RECOVERY)
    checkpointer.stop(_state(3))
    return files.read, folders(run)


def test_a_stop_does_not_wait_for_a_save_to_be_read_back(tmp_path, ranks) -> None:
    """What was not read back removes nothing either."""
    for read, left in ranks(2, _stopped_within_a_save, tmp_path):
        assert set(read) == {"1"}
        assert left == ["global_step_1", "global_step_2", "global_step_3"]


class Narrow(Files):
    """There is room for one checkpoint and a half."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        self.written.append(f"{operation} {path.name}")

    def free_bytes(self, path: Path) -> int:
        used = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        return 6_500_000 - used


def _narrow(run: Path) -> tuple[str, list[str], list[str]]:
    from sft_job.checkpoint.policy import Purpose
    from sft_job.errors import JobError

    files, said = Narrow(), []
    checkpointer = _small(run, files=files, warn=said.append)
    checkpointer.save(_state(1), Purpose.KEPT)
    checkpointer.collect(2.0)
    files.written.clear()
    checkpointer.save(_state(2), Purpose.RECOVERY)
    checkpointer.collect(2.0)
    try:
        checkpointer.save(_state(3), Purpose.STOP)
    except JobError as error:
        return str(error), said, files.written
    return "", said, files.written


def test_a_save_that_does_not_fit_is_refused_before_it_writes(tmp_path, ranks) -> None:
    found = ranks(2, _narrow, tmp_path)
    error, said, written = found[0]
    assert "cannot save step 3" in error
    assert "it needs 0.00 GiB" in error
    assert len(said) == 1
    assert "cannot save step 2" in said[0]
    assert "goes on from global_step_1" in said[0]
    assert written == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["global_step_1", "latest"]


def _one_after_the_other(run: Path) -> list[list[str]]:
    from sft_job.checkpoint.policy import Purpose

    checkpointer = _small(run)
    found = []
    for step, purpose in enumerate((Purpose.RECOVERY, Purpose.STOP, Purpose.RECOVERY, Purpose.KEPT), start=1):
        checkpointer.save(_state(step), purpose)
        if purpose is not Purpose.STOP:
            checkpointer._flight.work.wait(PATIENCE)
        checkpointer.collect(2.0)
        found.append(folders(run) if os.environ["RANK"] == "0" else [])
        torch.distributed.barrier()
    return found


def test_a_stop_removes_nothing(tmp_path, ranks) -> None:
    """What it has no time to read back proves nothing; the next save that was read back tidies up."""
    one, two, three, four = (f"global_step_{step}" for step in range(1, 5))
    assert ranks(2, _one_after_the_other, tmp_path)[0] == [[one], [one, two], [three], [four]]


def _in_narrow_memory(run: Path, room: int) -> list[tuple[bool, list[str]]]:
    import sft_job.checkpoint.checkpointer as room_of_saves

    room_of_saves.host_room = lambda *_: room
    found = []
    for stepped in (True, False):
        said: list[str] = []
        found.append((_small(run, stepped=stepped, warn=said.append)._asynchronous, said))
    return found


def test_a_copy_must_fit_beside_what_training_has_yet_to_take(tmp_path, ranks) -> None:
    """Weights and gradients of 1.4 MB each in host memory; before the first step AdamW's moments are still to come."""
    weights = 4 * (512 * 700 + 700)
    need = {True: 4 * weights, False: 6 * weights}  # the copy with its moments, gradients, moments
    (stepped, _), (fresh, said) = ranks(1, _in_narrow_memory, tmp_path, int(need[True] / 0.8) + 10)[0]
    assert (stepped, fresh) == (True, False)
    assert "trainer.async_save: a copy of the state, and what training has yet to take" in said[0]
    (stepped, _), (fresh, said) = ranks(1, _in_narrow_memory, tmp_path, int(need[False] / 0.8) + 10)[0]
    assert (stepped, fresh, said) == (True, True, [])
    (stepped, _), _ = ranks(1, _in_narrow_memory, tmp_path, int(need[True] / 0.8) - 10)[0]
    assert not stepped


class Forgetful(Files):
    """The disk of rank 1 gives back something else than what was written."""

    def read_back(self, path: Path) -> Any:
        content = super().read_back(path)
        wrong = os.environ["RANK"] == "1" and "global_step_2" in str(path)
        return replace(content, sha256="0" * 64) if wrong else content


def _forgetful(run: Path) -> list[str]:
    from sft_job.checkpoint.policy import Purpose
    from sft_job.errors import JobError

    checkpointer = _small(run, files=Forgetful())
    checkpointer.save(_state(1), Purpose.RECOVERY)
    checkpointer.save(_state(2), Purpose.KEPT)
    try:
        checkpointer.collect(2.0)
    except JobError as error:
        return [str(error)]
    return []


def test_nothing_is_published_that_the_disk_does_not_give_back(tmp_path, ranks) -> None:
    found = ranks(2, _forgetful, tmp_path)
    assert found[0] == found[1]
    assert "__1_0.distcp: what the disk gives back is not what was written" in found[0][0]
    assert folders(tmp_path) == ["global_step_1"]


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _ended(config: Any) -> str:
    from sft_job.errors import JobError

    try:
        run_job(config)
    except JobError as error:
        return f"exit {int(error.code)}: {error}"
    return ""


def _stopped(config: Any) -> Watched:
    return run_job(config, stop_after=2)


def test_no_code_runs_from_a_checkpoint(inputs, tmp_path, ranks) -> None:
    """Neither where the manifest speaks against it nor where it fits."""
    run = tmp_path / "run"
    config = config_of(inputs, run)
    ranks(1, _stopped, config)
    folder = run / "checkpoints" / "global_step_2"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(f"touch {tmp_path}/canary")))
    assert ".metadata" in ranks(1, _ended, config)[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / ".metadata").read_bytes()
    manifest["files"][".metadata"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = ranks(1, _ended, config)[0]
    assert message.startswith("exit 74")
    assert "which no index needs" in message
    assert not (tmp_path / "canary").exists()


def _twins(run: Path) -> list[bool]:
    from torch.distributed.tensor import DTensor

    from sft_job.checkpoint.staging import host_twin

    checkpointer = _small(run)
    found = []
    for parameter in checkpointer._module.parameters():
        twin = host_twin(parameter)
        assert isinstance(twin, DTensor)
        with torch.no_grad():
            twin.to_local().copy_(parameter.to_local())
        assert twin.placements == parameter.placements
        assert twin.to_local().untyped_storage().size() == twin.to_local().nbytes
        found.append(torch.equal(twin.full_tensor(), parameter.full_tensor()))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_memory_for_a_copy(tmp_path, ranks, world) -> None:
    """Of 1.4 MB it is pages of its own; with two ranks, 0.7 MB each, torch's."""
    assert ranks(world, _twins, tmp_path) == [[True, True]] * world


def _unstaged(run: Path, error: Exception, purpose: str) -> tuple[list[str], list[str], list[list[str]]]:
    """Rank 1 cannot copy the state of step 2; step 3 follows. Errors, warnings, what there was after each."""
    from sft_job.checkpoint.policy import Purpose, SavePolicy

    policy = SavePolicy(frozenset({"model", "optimizer"}), keep=1, end_on_failure=False)
    said: list[str] = []
    errors: list[str] = []
    there: list[list[str]] = []
    checkpointer = _small(run, policy=policy, warn=said.append)
    stage = checkpointer._staging.stage

    def fail(tree: Any) -> Any:
        raise error

    for step in (1, 2, 3):
        broken = step == 2 and os.environ["RANK"] == "1"
        checkpointer._staging.stage = fail if broken else stage
        try:
            checkpointer.save(_state(step), Purpose(purpose) if step == 2 else Purpose.KEPT)
            if checkpointer._flight is not None:
                assert step != 2 or "memory" not in str(error)
                checkpointer._flight.work.wait(PATIENCE)
            checkpointer.collect(2.0)
        except Exception as caught:
            errors.append(str(caught))
        torch.distributed.barrier()
        there.append(folders(run))
        torch.distributed.barrier()
    return errors, said, there


ONE, TWO, THREE = (["global_step_1"], ["global_step_2"], ["global_step_3"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError("no memory"),
    ],
    ids=["mmap", "torch", "python"],
)
@pytest.mark.parametrize(
    ("purpose", "left"),
    [("kept", [ONE, TWO, THREE]), ("recovery", [ONE, ONE, THREE]), ("stop", [ONE, ONE + TWO, THREE])],
)
def test_without_memory_for_a_copy_it_is_saved_without_one(tmp_path, ranks, error, purpose, left) -> None:
    """Training waits for it then; a recovery checkpoint is left out."""
    from sft_job.checkpoint.manifest import damage

    found = ranks(2, _unstaged, tmp_path, error, purpose, timeout=30.0)
    assert found[0] == found[1]
    errors, said, there = found[0]
    assert errors == []
    (line,) = said
    assert line.startswith("step 2: no host memory for a copy of the state")
    assert str(error)[:40] in line
    assert there == left
    assert damage(tmp_path / "checkpoints" / "global_step_3") is None


def test_what_one_rank_meets_before_it_writes_all_hear_of(tmp_path, ranks) -> None:
    found = ranks(2, _unstaged, tmp_path, OSError(5, "Input/output error"), "kept", timeout=30.0)
    assert found[0] == found[1]
    errors, said, there = found[0]
    assert (errors, len(said)) == ([], 1)
    assert "Input/output error" in said[0]
    assert there == [ONE, ONE, THREE]


class Starved(Files):
    """There is no memory to write with, on rank 1."""

    def before(self, operation: str, path: Path) -> None:
        if os.environ["RANK"] == "1" and operation == "write":
            raise MemoryError("no memory")


def _starved(run: Path, purpose: str) -> tuple[int, str, list[str]]:
    from sft_job.checkpoint.policy import Purpose
    from sft_job.errors import JobError

    said: list[str] = []
    checkpointer = _small(run, files=Starved(), warn=said.append)
    try:
        checkpointer.save(_state(1), Purpose(purpose))
        checkpointer._land()
    except JobError as error:
        return int(error.code), str(error), said
    return 0, "", said


@pytest.mark.parametrize("purpose", ["kept", "stop", "recovery"])
def test_memory_that_runs_out_while_it_is_written(tmp_path, ranks, purpose) -> None:
    """A recovery checkpoint may fail; an end for want of host memory is no bug, and says what it is."""
    found = ranks(2, _starved, tmp_path, purpose)
    assert found[0] == found[1]
    code, message, said = found[0]
    assert code == (0 if purpose == "recovery" else ExitCode.OUT_OF_MEMORY)
    text = (said or [message])[0]
    assert "cannot save step 1" in text
    assert "fix: more host memory" in text
    assert message.startswith("out of host memory") or purpose == "recovery"
    assert folders(tmp_path) == []


def _without_optimizer(run: Path) -> list[list[str]]:
    from sft_job.checkpoint.policy import Purpose, SavePolicy

    checkpointer = _small(run, policy=SavePolicy(frozenset({"model", "hf_model"}), keep=1, asynchronous=False))
    found = []
    for step, purpose in ((1, Purpose.RECOVERY), (2, Purpose.KEPT), (2, Purpose.STOP), (3, Purpose.KEPT)):
        if purpose is Purpose.STOP:
            checkpointer.stop(_state(step))
        else:
            checkpointer.save(_state(step), purpose)
        states = [] if os.environ["RANK"] == "1" else [read_state(path) for path in published(RunFolder(run))]
        found.append([f"{state.step} {state.kept} {'+'.join(state.contents)}" for state in states])
        torch.distributed.barrier()
    return found


def test_one_to_go_on_from_stays(tmp_path, ranks) -> None:
    """Kept checkpoints lack the optimizer: a stop at the same step adds it, and keeps what was exported."""
    found = ranks(2, _without_optimizer, tmp_path)[0]
    assert found == [
        ["1 False model+optimizer"],
        ["1 False model+optimizer", "2 True model"],
        ["1 False model+optimizer", "2 True model+optimizer"],
        ["2 True model+optimizer", "3 True model"],
    ]
    assert (tmp_path / "checkpoints" / "global_step_2" / "huggingface").is_dir()


def _export_without_memory(run: Path) -> tuple[bool, str]:
    from sft_job.checkpoint.policy import Purpose
    from sft_job.memory import is_out_of_memory

    def export(folder: Path, meet: Any) -> str:
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB; os error")
        return ""

    checkpointer = _small(run, export=export)
    try:
        checkpointer.save(_state(1), Purpose.LAST)
    except Exception as error:
        return is_out_of_memory(error), str(error)
    return False, ""


def test_memory_that_runs_out_in_the_export_is_said_so_by_all(tmp_path, ranks) -> None:
    """However it is worded, it is no failure of the disk."""
    found = ranks(2, _export_without_memory, tmp_path)
    assert found[0] == found[1]
    assert found[0][0]
    assert "Tried to allocate" in found[0][1]
    assert folders(tmp_path) == []
