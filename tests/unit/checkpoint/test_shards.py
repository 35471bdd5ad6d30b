"""Shards through our file operations: hashed on the way, complete or an error; read without running code."""

from __future__ import annotations

import os
import pickle
import threading
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

from sft_job.checkpoint.files import Content, Files, file_sha256
from sft_job.checkpoint.shards import SafeLoadPlanner, SafeReader, ShardWriter

LARGE = 4 << 30


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(5, 3, generator=generator) for name in "abcd"}
    return {"model": weights, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None}}


def save(folder: Path, state: dict[str, Any], files: Files | None = None, threads: int = 1) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, LARGE, threads, files or Files())
    dcp.save(state, storage_writer=writer, no_dist=True)
    return writer


def load(folder: Path) -> dict[str, Any]:
    state = {"model": {name: torch.zeros(5, 3) for name in "abcd"}, "optimizer": tensors()["optimizer"] | {"lr": 0.0}}
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    return state


@pytest.mark.parametrize("threads", [1, 3])
def test_there_and_back(tmp_path, threads) -> None:
    writer = save(tmp_path, tensors(), threads=threads)
    assert len(list(tmp_path.glob("*.distcp"))) == threads
    found = load(tmp_path)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in tensors()["model"].items())
    assert found["optimizer"] == tensors()["optimizer"]
    on_disk = {path.name: Content(path.stat().st_size, file_sha256(path)) for path in tmp_path.iterdir()}
    assert writer.written == on_disk
    assert writer.bytes_written == sum(content.bytes for content in on_disk.values())


def test_an_error_on_a_helper_thread_is_an_error(tmp_path) -> None:
    """torch's writer would go on with what the other threads wrote."""

    failed = threading.Event()

    class Full(Files):
        def before(self, operation: str, path: Path) -> None:
            if threading.current_thread() is threading.main_thread():
                assert failed.wait(60)  # so that one of the files is left for the helper
            elif operation == "write":
                failed.set()
                raise OSError(28, "No space left on device")

    with pytest.raises(dcp.CheckpointException) as caught:
        save(tmp_path, tensors(), Full(), threads=2)
    assert "No space left" in str(caught.value)
    assert not (tmp_path / ".metadata").exists()


def test_every_operation_is_seen(tmp_path) -> None:
    seen: list[tuple[str, str]] = []

    class Watching(Files):
        def before(self, operation: str, path: Path) -> None:
            seen.append((operation, path.name))

    save(tmp_path, tensors(), Watching())
    assert seen[0] == ("open", "__0_0.distcp")
    assert {("write", "__0_0.distcp"), ("fsync", "__0_0.distcp"), ("fsync", ".metadata.tmp")} <= set(seen)
    assert seen[-1] == ("rename", ".metadata")


def metadata_with(folder: Path, change: Any) -> None:
    save(folder, tensors())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))


def replaced(metadata: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(metadata, name, value)
    return metadata


def test_an_index_that_would_run_code_is_refused(tmp_path) -> None:
    canary = tmp_path / "canary"
    for index, change in enumerate(
        [
            lambda _: Evil(f"touch {canary}"),
            lambda metadata: replaced(metadata, planner_data=Evil(f"touch {canary}")),
            lambda metadata: replaced(metadata, storage_meta=Evil(f"touch {canary}")),
        ]
    ):
        folder = tmp_path / str(index)
        metadata_with(folder, change)
        with pytest.raises(dcp.CheckpointException, match="which no index needs"):
            load(folder)
    assert not canary.exists()
    os.system(f"touch {canary}")  # the command does what the test believes
    assert canary.exists()


class OldPickler(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, given: Any) -> Any:
        return (getattr, (type(given), given.name)) if isinstance(given, Enum) else NotImplemented


def test_an_index_of_an_older_python_is_read(tmp_path) -> None:
    save(tmp_path, tensors())
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    with (tmp_path / ".metadata").open("wb") as file:
        OldPickler(file).dump(metadata)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    found = load(tmp_path)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in tensors()["model"].items())


@pytest.mark.parametrize("what", [(TensorProperties, "__init__"), (_MEM_FORMAT_ENCODING, "mro"), (torch.Size, "index")])
def test_only_members_of_enumerations_are_taken_by_name(tmp_path, what: tuple[Any, str]) -> None:
    class Taken:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, what

    metadata_with(tmp_path, lambda metadata: replaced(metadata, planner_data=Taken()))
    with pytest.raises(dcp.CheckpointException, match="which no index needs"):
        load(tmp_path)


@pytest.mark.parametrize("name", [b"os.system", b"Enum", b"os", b"MetadataIndex.__init__.__globals__"])
def test_no_way_round_by_a_known_module(tmp_path, name) -> None:
    save(tmp_path, tensors())
    words = (b"torch.distributed.checkpoint.metadata", name)
    texts = b"".join(b"\x8c" + bytes([len(word)]) + word for word in words)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + texts + b"\x93.")
    with pytest.raises(dcp.CheckpointException, match="which no index needs"):
        load(tmp_path)


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path) -> None:
    def outside(metadata: Any) -> Any:
        for entry in metadata.storage_data.values():
            entry.relative_path = f"../{entry.relative_path}"
        return metadata

    folder = tmp_path / "checkpoint"
    metadata_with(folder, outside)
    with pytest.raises(dcp.CheckpointException, match="which is no shard"):
        load(folder)


def test_a_value_that_would_run_code_is_refused(tmp_path) -> None:
    canary = tmp_path / "canary"
    state = tensors()
    state["optimizer"]["lr"] = Evil(f"touch {canary}")
    save(tmp_path, state)
    with pytest.raises(dcp.CheckpointException, match=r"(?i)weights.only"):
        load(tmp_path)
    assert not canary.exists()
