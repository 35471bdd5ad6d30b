"""Uploads and downloads through fsspec's real file systems, and through ones that fail, stall or lose bytes."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sft_job.checkpoint.folder import mark_final, prune, publish, published, temporary_folder
from sft_job.checkpoint.manifest import damage
from sft_job.checkpoint.remote import RemoteStore, download_newest
from sft_job.checkpoint.remote_folder import url_problem
from sft_job.checkpoint.state import RunState
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError, ProblemsError

QUICK = (0.0, 0.0, 0.0)
STATE = RunState(
    step=1,
    total_steps=9,
    steps_per_epoch=9,
    epoch=0,
    rows_done=4,
    tokens=100,
    supervised_tokens=50,
    loss=2.0,
    world=1,
    ulysses=1,
    data="d",
    model="m",
    config={},
    kept=True,
    version="0",
)


def save(
    run: RunFolder,
    step: int,
    kept: bool = True,
    content: bytes = b"weights",
    contents: tuple[str, ...] = ("model", "optimizer", "extra"),
) -> Path:
    temporary = temporary_folder(run, step, "t")
    (temporary / "huggingface").mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(content * step)
    (temporary / ".metadata").write_bytes(b"")
    (temporary / "huggingface" / "config.json").write_text("{}")
    (temporary / "state.json").write_text(
        json.dumps(asdict(STATE) | {"step": step, "kept": kept, "contents": contents})
    )
    return publish(run, step, temporary)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> RunFolder:
    """The run folder on another machine, where nothing is yet."""
    return RunFolder(tmp_path / "other")


@pytest.fixture(params=["memory", "file", "path"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = uuid.uuid4().hex
    return {"memory": f"memory://{name}/run", "file": f"file://{tmp_path}/{name}", "path": f"{tmp_path}/{name}"}[
        request.param
    ]


@pytest.fixture
def warnings() -> list[str]:
    return []


class Trouble(MemoryFileSystem):
    """A store with switches for what goes wrong; the tests set ``act``, which sees every operation first."""

    protocol = "trouble"
    store: dict[str, Any] = {}  # noqa: RUF012  fsspec's own way: one store for all instances
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    act: Callable[[str, str], None] = staticmethod(lambda operation, path: None)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.act("put", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self.act("get", rpath)
        super().get_file(rpath, lpath, **kwargs)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self.act("write", path)
        super().pipe_file(path, value, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self.act("read", path)
        return super().cat_file(path, **kwargs)

    def ls(self, path: str, **kwargs: Any) -> Any:
        self.act("list", path)
        return super().ls(path, **kwargs)

    def rm(self, path: str, **kwargs: Any) -> None:
        self.act("remove", path)
        super().rm(path, **kwargs)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> type[Trouble]:
    fsspec.register_implementation("trouble", Trouble, clobber=True)
    monkeypatch.setattr(Trouble, "store", {})
    monkeypatch.setattr(Trouble, "pseudo_dirs", [""])
    monkeypatch.setattr(Trouble, "act", staticmethod(lambda operation, path: None))
    return Trouble


TROUBLE = "trouble://bucket/run"


def read(url: str, name: str) -> str:
    return fsspec.open(f"{url}/{name}", "r").open().read()


def there(url: str) -> list[str]:
    """Names of the checkpoints in a store that have a manifest, and of the pointers."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    entries = [str(entry["name"]).rpartition("/")[2] for entry in fs.ls(root, detail=True)]
    return sorted(name for name in entries if "global" not in name or fs.exists(f"{root}/{name}/manifest.json"))


def upload(run: RunFolder, url: str, *steps: int, keep: int | None = None) -> None:
    """Send checkpoints one after the other, as a run with time between them does."""
    for step in steps:
        store = RemoteStore(url, pytest.fail, keep, QUICK)
        store.upload(run.step(step))
        assert store.close(60)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestThereAndBack:
    def test_the_newest_comes_back_whole(self, run: RunFolder, other: RunFolder, url: str) -> None:
        for step in (2, 10, 9):
            save(run, step)
        store = RemoteStore(url, pytest.fail, None, QUICK)
        for step in (2, 10, 9):
            store.upload(run.step(step))
        assert store.close(60)
        assert store.waiting == []
        assert there(url) == ["global_step_10", "global_step_2", "global_step_9", "latest"]
        assert read(url, "latest") == "global_step_10"
        folder = download_newest(url, other, pytest.fail, QUICK)
        assert folder == other.step(10)
        assert damage(folder) is None
        assert content(folder) == content(run.step(10))
        assert other.latest.read_text() == "global_step_10"
        assert sorted(path.name for path in other.checkpoints.iterdir()) == ["global_step_10", "latest"]
        assert sorted(path.name for path in run.checkpoints.iterdir())[0].startswith("global")  # no pins are left

    def test_nothing_there(self, other: RunFolder, url: str) -> None:
        assert download_newest(url, other, pytest.fail, QUICK) is None
        assert not other.root.exists()

    def test_own_checkpoints_come_first(self, run: RunFolder, other: RunFolder, url: str) -> None:
        save(run, 5)
        upload(run, url, 5)
        other.checkpoints.mkdir(parents=True)
        save(other, 1)
        assert download_newest(url, other, pytest.fail, QUICK) is None
        assert published(other) == [other.step(1)]

    def test_a_finished_run_comes_back_finished(self, run: RunFolder, other: RunFolder, url: str) -> None:
        mark_final(run, save(run, 4))
        upload(run, url, 4)
        download_newest(url, other, pytest.fail, QUICK)
        assert other.final.resolve() == other.step(4)

    def test_a_longer_run_is_not_finished(self, run: RunFolder, other: RunFolder, url: str) -> None:
        mark_final(run, save(run, 4))
        upload(run, url, 4)
        save(run, 6)
        upload(run, url, 6)
        assert download_newest(url, other, pytest.fail, QUICK) == other.step(6)
        assert not other.final.exists()

    def test_the_same_checkpoint_is_not_sent_twice(self, run: RunFolder, trouble: type[Trouble]) -> None:
        save(run, 3)
        upload(run, TROUBLE, 3)
        operations: list[str] = []
        trouble.act = staticmethod(lambda operation, path: operations.append(operation))
        mark_final(run, run.step(3))
        upload(run, TROUBLE, 3)
        assert "put" not in operations
        assert read(TROUBLE, "final") == "global_step_3"

    def test_another_checkpoint_of_the_same_step_takes_its_place(
        self, run: RunFolder, other: RunFolder, url: str
    ) -> None:
        folder = save(run, 3)
        (folder / "surplus").write_text("of an earlier save")
        upload(run, url, 3)
        shutil.rmtree(folder)
        save(run, 3, content=b"others!")
        upload(run, url, 3)
        found = download_newest(url, other, pytest.fail, QUICK)
        assert found is not None
        assert content(found) == content(run.step(3))
        fs, root = fsspec.core.url_to_fs(url)
        assert not fs.exists(f"{root}/global_step_3/surplus")


class TestHalfSent:
    @pytest.mark.parametrize("sent", range(5))
    def test_is_never_taken_for_whole(
        self, run: RunFolder, other: RunFolder, trouble: type[Trouble], warnings: list[str], sent: int
    ) -> None:
        """The process dies after any number of files of the second checkpoint."""
        for step in (1, 2):
            save(run, step)
        upload(run, TROUBLE, 1)
        left = [sent]

        def die(operation: str, path: str) -> None:
            if operation in ("put", "write"):
                if not left[0]:
                    raise PermissionError("dead")
                left[0] -= 1

        trouble.act = staticmethod(die)
        store = RemoteStore(TROUBLE, warnings.append, None, QUICK)
        store.upload(run.step(2))
        assert not store.close(60)
        trouble.act = staticmethod(lambda operation, path: None)
        assert read(TROUBLE, "latest") == "global_step_1"
        warnings.clear()
        assert download_newest(TROUBLE, other, warnings.append, QUICK) == other.step(1)
        assert ["global_step_2 was never wholly uploaded" in text for text in warnings] == [True]
        upload(run, TROUBLE, 2)
        assert there(TROUBLE) == ["global_step_1", "global_step_2", "latest"]

    def test_one_that_is_replaced_is_none_meanwhile(self, run: RunFolder, trouble: type[Trouble]) -> None:
        save(run, 3)
        upload(run, TROUBLE, 3)
        shutil.rmtree(run.step(3))
        save(run, 3, content=b"others!")
        seen: list[bool] = []
        trouble.act = staticmethod(
            lambda operation, path: (
                seen.append(any("step_3/manifest" in name for name in trouble.store)) if operation == "put" else None
            )
        )
        upload(run, TROUBLE, 3)
        assert seen == [False] * 4


class TestDownloadFaults:
    @pytest.fixture
    def sent(self, run: RunFolder, trouble: type[Trouble]) -> str:
        for step in (1, 2):
            save(run, step)
        upload(run, TROUBLE, 1, 2)
        return TROUBLE

    @pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "escape", "stateless"])
    def test_damaged_is_named_and_the_one_before_is_taken(
        self, sent: str, other: RunFolder, warnings: list[str], harm: str
    ) -> None:
        fs, root = fsspec.core.url_to_fs(sent)
        weights, manifest = f"{root}/global_step_2/__0_0.distcp", f"{root}/global_step_2/manifest.json"
        entries = json.loads(fs.cat_file(manifest))
        if harm == "flip":
            fs.pipe_file(weights, b"Weightsweights")
        elif harm == "cut":
            fs.pipe_file(weights, b"weights")
        elif harm == "remove":
            fs.rm(weights)
        elif harm == "manifest":
            fs.pipe_file(manifest, b'{"files": {"stat')
        elif harm == "escape":
            fs.pipe_file(f"{root}/global_step_2/../../evil", b"evil")
            fs.pipe_file(manifest, json.dumps({"files": {"../../evil": {"bytes": 4, "sha256": ""}}}).encode())
        else:
            del entries["files"]["state.json"]
            fs.pipe_file(manifest, json.dumps(entries).encode())
        assert download_newest(sent, other, warnings.append, QUICK) == other.step(1)
        assert len(warnings) == 1
        assert "global_step_2: damaged, not used" in warnings[0]
        assert not (other.root / "evil").exists()
        assert sorted(path.name for path in other.checkpoints.iterdir()) == ["global_step_1", "latest"]

    def test_none_usable_is_an_error(self, sent: str, other: RunFolder, warnings: list[str]) -> None:
        fs, root = fsspec.core.url_to_fs(sent)
        for step in (1, 2):
            fs.rm(f"{root}/global_step_{step}/__0_0.distcp")
        with pytest.raises(JobError, match=r"(?s)no uploaded checkpoint is usable.*step_2.*step_1") as raised:
            download_newest(sent, other, warnings.append, QUICK)
        assert raised.value.code is ExitCode.NO_CHECKPOINT

    def test_an_outage_never_starts_the_run_over(self, sent: str, other: RunFolder, trouble: type[Trouble]) -> None:
        def away(operation: str, path: str) -> None:
            raise ConnectionError("the bucket is away")

        trouble.act = staticmethod(away)
        with pytest.raises(JobError, match=r"cannot be read.*the bucket is away") as raised:
            download_newest(sent, other, pytest.fail, QUICK)
        assert raised.value.code is ExitCode.LOST
        assert published(other) == []

    def test_a_hiccup_costs_an_attempt(self, sent: str, other: RunFolder, trouble: type[Trouble]) -> None:
        seen: set[tuple[str, str]] = set()

        def hiccup(operation: str, path: str) -> None:
            if (operation, path) not in seen:
                seen.add((operation, path))
                raise TimeoutError("slow")

        trouble.act = staticmethod(hiccup)
        assert download_newest(sent, other, pytest.fail, QUICK) == other.step(2)

    def test_no_rights_and_unknown_urls_are_the_configuration(
        self, sent: str, other: RunFolder, trouble: type[Trouble]
    ) -> None:
        def forbidden(operation: str, path: str) -> None:
            raise PermissionError("403")

        trouble.act = staticmethod(forbidden)
        for url, text in ((sent, "403"), ("nosuch://bucket/x", "nosuch"), ("dask://x", "distributed")):
            with pytest.raises(ProblemsError, match=text) as raised:
                download_newest(url, other, pytest.fail, QUICK)
            assert raised.value.code is ExitCode.CONFIG

    def test_full_disk(self, sent: str, other: RunFolder, trouble: type[Trouble]) -> None:
        def full(operation: str, path: str) -> None:
            if operation == "get":
                raise OSError(28, "No space left on device")

        trouble.act = staticmethod(full)
        with pytest.raises(JobError, match="No space left") as raised:
            download_newest(sent, other, pytest.fail, QUICK)
        assert raised.value.code is ExitCode.CANNOT_CREATE
        assert list(other.checkpoints.iterdir()) == []


class TestUploadFaults:
    def test_hiccups_are_overcome_in_silence(self, run: RunFolder, other: RunFolder, trouble: type[Trouble]) -> None:
        calls = [0]

        def hiccup(operation: str, path: str) -> None:
            calls[0] += 1
            if calls[0] % 4:
                raise ConnectionError("slow down")

        save(run, 2)
        trouble.act = staticmethod(hiccup)
        upload(run, TROUBLE, 2)
        trouble.act = staticmethod(lambda operation, path: None)
        assert download_newest(TROUBLE, other, pytest.fail, QUICK) == other.step(2)

    def test_lost_bytes_are_noticed(
        self, run: RunFolder, other: RunFolder, trouble: type[Trouble], monkeypatch
    ) -> None:
        save(run, 2)
        put, calls = MemoryFileSystem.put_file, [0]

        def lossy(self: Any, lpath: str, rpath: str, **kwargs: Any) -> None:
            put(self, lpath, rpath, **kwargs)
            calls[0] += 1
            if calls[0] == 2:
                self.store[self._strip_protocol(rpath)] = self.store.pop(self._strip_protocol(rpath)).__class__(
                    self, self._strip_protocol(rpath), b"cut"
                )

        monkeypatch.setattr(Trouble, "put_file", lossy)
        upload(run, TROUBLE, 2)
        assert calls[0] == 5
        assert download_newest(TROUBLE, other, pytest.fail, QUICK) == other.step(2)

    def test_an_outage_is_one_warning_and_is_made_good_by_the_next_checkpoint(
        self, run: RunFolder, trouble: type[Trouble], warnings: list[str]
    ) -> None:
        tried = threading.Semaphore(0)

        def away(operation: str, path: str) -> None:
            tried.release()
            raise PermissionError("the key has expired")

        trouble.act = staticmethod(away)
        store = RemoteStore(TROUBLE, warnings.append, None, QUICK)
        store.upload(save(run, 1))
        assert tried.acquire(timeout=60)
        store.upload(save(run, 2))
        assert tried.acquire(timeout=60)  # of the second
        assert tried.acquire(timeout=60)  # of the first, again
        trouble.act = staticmethod(lambda operation, path: None)
        store.upload(save(run, 3))
        deadline = time.monotonic() + 60
        while store.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert there(TROUBLE) == ["global_step_1", "global_step_2", "global_step_3", "latest"]
        assert read(TROUBLE, "latest") == "global_step_3"
        assert store.close(60)
        assert len(warnings) == 1
        assert "could not be copied to trouble://bucket/run: PermissionError: the key has expired" in warnings[0]

    def test_the_newest_goes_first(self, run: RunFolder, trouble: type[Trouble]) -> None:
        begun, gate = threading.Event(), threading.Event()
        order: list[str] = []

        def slow(operation: str, path: str) -> None:
            if operation == "put" and not begun.is_set():
                begun.set()
                assert gate.wait(60)
            if path.endswith("manifest.json") and operation == "write":
                order.append(path.split("/")[-2])

        trouble.act = staticmethod(slow)
        store = RemoteStore(TROUBLE, pytest.fail, None, QUICK)
        store.upload(save(run, 1))
        assert begun.wait(60)
        for step in (2, 3, 4):
            store.upload(save(run, step))
        gate.set()
        assert store.close(60)
        assert order == ["global_step_1", "global_step_4", "global_step_3", "global_step_2"]

    def test_what_never_came_is_named_at_the_end(
        self, run: RunFolder, trouble: type[Trouble], warnings: list[str]
    ) -> None:
        def away(operation: str, path: str) -> None:
            if "global_step_2" in path:
                raise ConnectionError("the bucket is away")

        trouble.act = staticmethod(away)
        store = RemoteStore(TROUBLE, warnings.append, None, QUICK)
        for step in (1, 2):
            store.upload(save(run, step))
        assert not store.close(60)
        assert "not at trouble://bucket/run: global_step_2 (ConnectionError: the bucket is away)" in warnings[-1]
        assert str(run.checkpoints) in warnings[-1]
        assert there(TROUBLE) == ["global_step_1", "latest"]

    def test_a_hanging_store_holds_nobody_up(self, run: RunFolder, trouble: type[Trouble], warnings: list[str]) -> None:
        gate = threading.Event()
        trouble.act = staticmethod(lambda operation, path: gate.wait(60) and None)
        store = RemoteStore(TROUBLE, warnings.append, None, QUICK)
        for step in range(1, 20):
            store.upload(save(run, step))  # would hang here for ever
        assert len(store.waiting) == 19
        assert not store.close(0.05)
        assert "global_step_19 (not done within 0.05 s)" in warnings[-1]
        gate.set()
        store._thread.join(60)
        assert not store._thread.is_alive()
        assert not list(run.checkpoints.glob(".uploading_*"))

    def test_a_package_that_is_missing(self, run: RunFolder, warnings: list[str]) -> None:
        store = RemoteStore("nosuch://bucket", warnings.append, None, QUICK)
        store.upload(save(run, 1))
        assert not store.close(60)
        assert "nosuch" in warnings[0]


class TestRetention:
    def test_pruned_before_its_turn_is_left_out_and_pruned_while_sent_is_finished(
        self, run: RunFolder, trouble: type[Trouble], warnings: list[str]
    ) -> None:
        """A store that is slower than the run: while checkpoint 1 is being sent, 2 and 3 come and 1 and 2 go."""
        begun, gate = threading.Event(), threading.Event()

        def slow(operation: str, path: str) -> None:
            if operation == "put":
                begun.set()
                assert gate.wait(60)

        trouble.act = staticmethod(slow)
        store = RemoteStore(TROUBLE, warnings.append, None, QUICK)
        store.upload(save(run, 1))
        assert begun.wait(60)
        for step in (2, 3):
            store.upload(save(run, step))
            prune(run, run.step(step), 1)
        assert published(run) == [run.step(3)]
        gate.set()
        assert store.close(60)
        assert warnings == []
        assert there(TROUBLE) == ["global_step_1", "global_step_3", "latest"]

    def test_without_hard_links_a_pruned_one_is_left_out(
        self, run: RunFolder, trouble: type[Trouble], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(*args: object, **kwargs: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
        begun, gate = threading.Event(), threading.Event()

        def slow(operation: str, path: str) -> None:
            if operation == "put":
                begun.set()
                assert gate.wait(60)

        trouble.act = staticmethod(slow)
        store = RemoteStore(TROUBLE, pytest.fail, None, QUICK)
        store.upload(save(run, 1))
        assert begun.wait(60)
        store.upload(save(run, 2))
        prune(run, run.step(2), 1)
        gate.set()
        assert store.close(60)
        assert there(TROUBLE) == ["global_step_2", "latest"]

    def test_the_store_keeps_what_the_run_keeps(self, run: RunFolder, url: str) -> None:
        for step, kept in ((2, True), (3, False), (4, True), (6, True), (7, False)):
            save(run, step, kept)
            prune(run, run.step(step), 2)
            upload(run, url, step, keep=2)
            assert [name for name in there(url) if "global" in name] == [path.name for path in published(run)]

    def test_the_one_to_go_on_from_outlives_exports(self, run: RunFolder, url: str) -> None:
        """Kept exports and a recovery checkpoint: the only one that a new machine can go on from stays."""
        save(run, 2, kept=False)
        upload(run, url, 2, keep=1)
        for step in (3, 4):
            save(run, step, contents=("hf_model",))
            upload(run, url, step, keep=1)
        assert [name for name in there(url) if "global" in name] == ["global_step_2", "global_step_4"]

    def test_a_half_sent_older_one_goes(self, run: RunFolder, trouble: type[Trouble]) -> None:
        fs, root = fsspec.core.url_to_fs(TROUBLE)
        fs.makedirs(f"{root}/global_step_1")
        fs.pipe_file(f"{root}/global_step_1/__0_0.distcp", b"half")
        fs.pipe_file(f"{root}/notes.txt", b"not ours")
        fs.makedirs(f"{root}/global_step_9")
        fs.pipe_file(f"{root}/global_step_9/__0_0.distcp", b"a later one is not this run's to judge")
        save(run, 2)
        upload(run, TROUBLE, 2)
        names = [entry["name"].rpartition("/")[2] for entry in fs.ls(root, detail=True)]
        assert sorted(names) == ["global_step_2", "global_step_9", "latest", "notes.txt"]

    def test_retention_that_fails_is_a_warning(
        self, run: RunFolder, trouble: type[Trouble], warnings: list[str]
    ) -> None:
        for step in (1, 2):
            save(run, step)
        upload(run, TROUBLE, 1)

        def undeletable(operation: str, path: str) -> None:
            if operation == "remove" and path.endswith("global_step_1"):
                raise PermissionError("locked bucket")

        trouble.act = staticmethod(undeletable)
        store = RemoteStore(TROUBLE, warnings.append, 1, QUICK)
        store.upload(run.step(2))
        assert store.close(60)
        assert len(warnings) == 1
        assert "could not be removed: PermissionError: locked bucket" in warnings[0]
        assert there(TROUBLE) == ["global_step_2", "latest"]  # what is left of the first is no checkpoint


def test_urls_that_can_be_used() -> None:
    assert url_problem("memory://x") is None
    assert url_problem("/some/folder") is None
    for url in ("nosuch://bucket", "s3a-typo://bucket"):
        problem = url_problem(url)
        assert problem is not None
        assert (problem.code, problem.subject) == (ExitCode.CONFIG, "trainer.default_hdfs_dir")


def test_only_checkpoints_are_uploaded(tmp_path: Path) -> None:
    store = RemoteStore(str(tmp_path), pytest.fail, None, QUICK)
    with pytest.raises(ValueError, match="no checkpoint's name"):
        store.upload(tmp_path / "final")
    assert store.close(60)
