"""Shards on disk in torch's own format (DCP): written through our file operations and hashed on the way, read without
letting a pickle run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sft_job.checkpoint.files import Content, Files, HashedStream
from sft_job.checkpoint.manifest import INDEX

_FILE_BYTES = 1 << 30
_MOST_FILES = 8


class _WatchedFileSystem(FileSystem):
    """DCP's file operations by way of ours; remembers what was written and the first error."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.streams: dict[str, HashedStream] = {}
        self.error: Exception | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with self._files.writing(Path(path)) as stream:
                self.streams[Path(path).name] = stream
                yield cast(io.IOBase, stream)
        except Exception as error:
            self.error = self.error or error
            raise

    def rename(self, path: Any, new_path: Any) -> None:
        self._files.rename(Path(path), Path(new_path))
        self.streams[Path(new_path).name] = self.streams.pop(Path(path).name)

    def mkdir(self, path: Any) -> None:
        if not Path(path).is_dir():
            self._files.mkdir(Path(path))

    def rm_file(self, path: Any) -> None:
        self._files.remove(Path(path))


class ShardWriter(FileSystemWriter):
    """Writes this rank's shards, durable when ``save`` returns, in several files at once where they are large.

    Args:
        folder: exists, empty.
        local_bytes: about what this rank will write.
        threads: files that are written at once, at most.
        files: does the file operations.
    """

    def __init__(self, folder: Path, local_bytes: int, threads: int, files: Files) -> None:
        count = max(1, min(_MOST_FILES, threads, local_bytes // _FILE_BYTES))
        # Copying ahead would wait for the training's stream; our own stream makes files durable.
        super().__init__(folder, sync_files=False, thread_count=count, per_thread_copy_ahead=0)
        self._watched = _WatchedFileSystem(files)
        self.fs = self._watched

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan; raises what any of the writing threads met."""
        written = super().write_data(plan, planner)
        if self._watched.error is not None:
            raise self._watched.error
        if len(written.value()) != len(plan.items):  # torch's helper threads keep their errors to themselves
            raise OSError(f"{len(written.value())} of {len(plan.items)} tensors were written")
        return written

    @property
    def bytes_written(self) -> int:
        """By this rank, so far."""
        return sum(stream.tell() for stream in list(self._watched.streams.values()))

    @property
    def error(self) -> Exception | None:
        """The first error of a file operation, as Python raised it."""
        return self._watched.error

    @property
    def written(self) -> dict[str, Content]:
        """The files that this rank wrote, by name."""
        return {name: stream.content for name, stream in self._watched.streams.items()}


class SafeReader(FileSystemReader):
    """Reads a checkpoint whose index may name nothing but what an index needs: unpickling it runs no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the shards.

        Raises:
            pickle.UnpicklingError: it holds something else than an index, or names files outside its folder.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds no index")
        for entry in cast("Mapping[Any, Any]", metadata.storage_data or {}).values():
            name = entry.relative_path
            if not isinstance(name, str) or PurePath(name).name != name or entry.transform_descriptors:
                raise pickle.UnpicklingError(f"{INDEX} names {name!r}, which is no shard")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index, all of them plain records, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) in {("torch", "Size"), ("collections", "OrderedDict")}
            or (module, name) == ("torch.serialization", "_get_layout")
            or (module in {"pathlib", "pathlib._local"} and name in {"Path", "PosixPath", "PurePosixPath"})
        )
        # A dotted name would walk from a known class to anything that it can reach.
        if known and "." not in name:
            found = super().find_class(module, name)
            if module != "torch.distributed.checkpoint.metadata" or getattr(found, "__module__", "") == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"{INDEX} asks for {module}.{name}, which no index needs")


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads what is not a tensor (settings of parameter groups) as plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take one such value.

        Raises:
            pickle.UnpicklingError: it is more than a plain value.
        """
        plain = torch.load(value, weights_only=True)
        # The planner itself would unpickle anything: it gets what was found to be plain.
        copy = io.BytesIO()
        torch.save(plain, copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


def _member(kind: Any, name: Any) -> Enum:
    """Stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{INDEX} asks for {name!r} of {kind!r}, which no index needs")
