"""Whatever is saved, kept, killed and started again: the newest whole checkpoint is never lost."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_job.checkpoint.files import Files
from sft_job.checkpoint.folder import (
    clear_leftovers,
    drop_temporary,
    linked,
    mark_final,
    newest_whole,
    prune,
    publish,
    published,
    temporary_folder,
)
from sft_job.checkpoint.manifest import changed_on_disk, damage
from sft_job.checkpoint.retention import Held, superfluous
from sft_job.checkpoint.save import already_there, begin
from sft_job.checkpoint.state import TO_GO_ON, RunState, read_state
from sft_job.contract import RunFolder

STATE = RunState(1, 8, 4, 0, 4, 100, 50, 2.0, 1, 1, "d", "m", {}, True, "0")


class KilledError(BaseException):
    """As SIGKILL: nothing is tidied up."""


class Counting(Files):
    """Counts operations; ends the process, or fails, before a chosen one."""

    def __init__(self, last: int | None = None, error: BaseException | None = None) -> None:
        self.left = last
        self.error = error or KilledError()
        self.seen: list[tuple[str, str]] = []

    def before(self, operation: str, path: Path) -> None:
        self.seen.append((operation, path.name))
        if self.left is not None:
            if self.left == 0:
                raise self.error
            self.left -= 1


def save(
    run: RunFolder, step: int, kept: bool, keep: int | None, files: Files, *, verify: bool = True, whole: bool = True
) -> Path:
    """What ``Writing`` does on one rank, with two files in place of shards; without the optimizer where not whole."""
    contents = ("model", "optimizer") if whole else ("model",)
    state = replace(STATE, step=step, kept=kept, contents=contents)
    if already_there(run, state) is not None:
        return run.step(step)
    temporary = temporary_folder(run, step, "t")
    begin(run, temporary, 0, files)
    known = {}
    for name in ("__0_0.distcp", ".metadata"):
        with files.writing(temporary / name) as file:
            file.write(f"weights of step {step}".encode())
        known[name] = file.content
    with files.writing(temporary / "state.json") as file:
        file.write(state.to_json().encode())
    if verify:
        assert changed_on_disk(temporary, known, files) is None
    folder = publish(run, step, temporary, known, None, files)
    if verify:
        prune(run, folder, keep, files)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


Save = tuple[bool, int | None, int | None, bool, bool]
keeps, killed_at = st.one_of(st.none(), st.integers(1, 3)), st.one_of(st.none(), st.integers(0, 32))
saves = st.lists(st.tuples(st.booleans(), keeps, killed_at, st.booleans(), st.booleans()), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40)
@given(saves)
@example(
    [
        (False, None, None, False, False),
        (True, None, None, False, False),
        (True, None, None, False, False),
        (False, None, 0, False, False),
        (False, None, None, False, False),
    ]
)
def test_a_whole_newest_checkpoint_remains(tmp_path_factory, history: list[Save]) -> None:
    """Each save: kept or not, max_ckpt_to_keep (it may change between starts), killed at an operation, verified, and
    with the optimizer or, of a kept one, without."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.checkpoints.mkdir()
    step, proved = 0, 0
    for kept, keep, last, verify, with_optimizer in history:
        step += 1
        whole = with_optimizer or not kept
        killed = False
        try:
            save(run, step, kept, keep, Counting(last), verify=verify, whole=whole)
            proved = step if whole else proved
        except KilledError:
            clear_leftovers(run)
            killed = True
        newest_of_all, notes = newest_whole(published(run))
        assert notes == []  # nothing with a checkpoint's name is half one
        # Later ones that the run could not go on from go with the next save that is read back.
        later = [] if verify else [run.step(each) for each in range(step + 1, len(history) + 1)]
        assert killed or newest_of_all in (run.step(step), *later)
        found, _ = newest_whole(published(run), TO_GO_ON)
        newest = 0 if found is None else read_state(found).step
        assert newest >= proved
        proved = newest
        if newest:
            assert run.step(newest).joinpath("__0_0.distcp").read_text() == f"weights of step {newest}"
        step = newest if killed else step  # the next start goes on from here
    hidden = [path.name for path in run.checkpoints.iterdir() if path.name.startswith((".saving", ".pruned", ".repl"))]
    assert hidden == []


@given(st.dictionaries(st.integers(1, 30), st.builds(Held, st.booleans(), st.booleans())), keeps)
def test_which_ones_are_superfluous(held: dict[int, Held], keep: int | None) -> None:
    left = sorted(held.keys() - set(superfluous(held, keep)))
    assert left[-1:] == sorted(held)[-1:]  # the newest stays, whatever it is
    resumable = [step for step in sorted(held) if held[step].resumable]
    assert set(resumable[-1:]) <= set(left)
    kept = [step for step in sorted(held) if held[step].kept]
    assert set(kept if keep is None else kept[-keep:]) <= set(left)
    if held:
        assert set(left) <= {*(kept if keep is None else kept[-keep:]), max(held), *resumable[-1:]}


def test_killed_at_every_operation(tmp_path) -> None:
    """Over a damaged checkpoint of the same step too, which needs two renames."""
    total = None
    for last in range(200):
        run = RunFolder(tmp_path / str(last))
        run.checkpoints.mkdir(parents=True)
        for step in (1, 2, 3):
            save(run, step, step == 1, 2, Files())
        (run.step(4)).mkdir()
        (run.step(4) / "state.json").write_text("half")
        files = Counting(last)
        try:
            save(run, 4, True, 1, files)
        except KilledError:
            clear_leftovers(run)
            found, _ = newest_whole(published(run))
            assert found in (run.step(3), run.step(4)), last
            assert damage(run.checkpoints / run.latest.read_text()) is None
        else:
            total = last
            break
    assert total is not None
    assert total > 20
    assert published(run) == [run.step(4)]
    assert {operation for operation, _ in files.seen} == {"open", "write", "fsync", "rename", "mkdir", "remove"}


def test_everything_is_durable_before_it_has_a_name(run) -> None:
    files = Counting()
    folder = save(run, 1, True, None, files)
    named = files.seen.index(("rename", "global_step_1"))
    pointed = files.seen.index(("rename", "latest"))
    names = {path.name for path in folder.iterdir()} - {"manifest.json"} | {".manifest.json.tmp"}
    for name in names:
        assert files.seen.index(("fsync", name)) < named
    assert files.seen.index(("fsync", ".saving_t_global_step_1")) < named
    assert named < files.seen.index(("fsync", "checkpoints")) < pointed
    assert files.seen.index(("fsync", ".latest.tmp")) < pointed
    assert files.seen[-1] == ("fsync", "checkpoints")


@pytest.mark.parametrize("number", [28, 5, 13])
def test_a_failing_disk_leaves_the_old_ones(tmp_path, number) -> None:
    """ENOSPC, EIO, EACCES before each operation up to the publication: the older checkpoints are as they were."""
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    save(run, 1, True, None, Files())
    before = {path: path.read_bytes() for path in run.step(1).iterdir()}
    for last in range(200):
        try:
            save(run, 2, True, 1, Counting(last, OSError(number, os.strerror(number))), verify=False)
        except OSError:
            clear_leftovers(run)
            assert {path: path.read_bytes() for path in run.step(1).iterdir()} == before
            assert newest_whole(published(run))[1] == []
        if run.step(2).exists():
            break
    assert damage(run.step(2)) is None


class Cleared(Files):
    """Another start clears the temporary folder just before it would get its name."""

    def before(self, operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "global_step_2":
            self.remove(temporary_folder(RunFolder(path.parents[1]), 2, "t"))


def test_what_was_set_aside_comes_back_where_the_new_one_cannot_have_its_name(run) -> None:
    """As of a holder that was taken for dead between its look at the lock and the rename."""
    save(run, 2, True, None, Files())
    content = {path.name: path.read_bytes() for path in run.step(2).iterdir()}
    temporary = temporary_folder(run, 2, "t")
    temporary.mkdir()
    (temporary / "state.json").write_text("another")
    with pytest.raises(FileNotFoundError):
        publish(run, 2, temporary, None, None, Cleared())
    assert {path.name: path.read_bytes() for path in run.step(2).iterdir()} == content
    assert run.latest.read_text() == "global_step_2"


def test_a_start_clears_what_others_left_and_a_failed_save_only_its_own(run) -> None:
    for token in ("mine", "other"):
        temporary_folder(run, 2, token).mkdir()
    drop_temporary(run, "mine", Files())
    assert [path.name for path in run.checkpoints.iterdir()] == [".saving_other_global_step_2"]
    clear_leftovers(run)
    assert list(run.checkpoints.iterdir()) == []


def test_nothing_is_deleted_for_one_that_was_not_read_back(run) -> None:
    for step in (1, 2, 3):
        save(run, step, False, 1, Files(), verify=False)
    assert published(run) == [run.step(1), run.step(2), run.step(3)]
    save(run, 4, True, 1, Files())
    assert published(run) == [run.step(4)]


def test_what_the_disk_gives_back_is_compared(run) -> None:
    save(run, 1, True, None, Files())
    files = Files()
    with files.writing(run.step(1) / "shard") as file:
        file.write(b"meant")
    known = {"shard": file.content}
    assert changed_on_disk(run.step(1), known, files) is None
    (run.step(1) / "shard").write_bytes(b"found")
    assert "shard" in (changed_on_disk(run.step(1), known, files) or "")


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_a_known_file_that_is_not_there_is_not_published(run, harm) -> None:
    files = Files()
    save(run, 1, True, None, files)
    begin(run, temporary_folder(run, 2, "t"), 0, files)
    path = temporary_folder(run, 2, "t") / "__1_0.distcp"
    with files.writing(path) as file:
        file.write(b"weights")
    known = {path.name: file.content}
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"half")
    with pytest.raises(OSError, match=r"__1_0\.distcp: not there with its 7 bytes"):
        publish(run, 2, path.parent, known)
    assert published(run) == [run.step(1)]
    assert run.latest.read_text() == "global_step_1"


def test_too_little_space_is_said_before_anything_is_written(run) -> None:
    save(run, 1, True, None, Files())
    files = Counting()
    with pytest.raises(OSError, match=r"it needs 4096\.00 GiB, and .* are free"):
        begin(run, temporary_folder(run, 2, "t"), 2**42, files)
    assert files.seen == []
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["global_step_1", "latest"]


class TestLeftovers:
    @pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
    @pytest.mark.parametrize("name", [".saving_t_global_step_2", ".pruned_global_step_2", ".replaced_global_step_2"])
    def test_hidden_names_of_ours(self, run, tmp_path, kind, name) -> None:
        save(run, 1, True, None, Files())
        save(run, 2, True, None, Files())
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_text("x")
        path = run.checkpoints / name
        if kind == "folder":
            path.mkdir()
            (path / "inner").symlink_to(victim)
        elif kind == "file":
            path.write_text("half")
        else:
            path.symlink_to(victim if kind == "link" else tmp_path / "nothing")
        clear_leftovers(run)
        save(run, 3, True, 1, Files())
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["global_step_3", "latest"]
        assert (victim / "precious").read_text() == "x"

    def test_a_file_in_the_folder_s_place(self, run) -> None:
        run.step(2).write_text("not a folder")
        assert published(run) == []
        assert damage(save(run, 2, True, None, Files())) is None

    @pytest.mark.parametrize("kind", ["empty", "garbage", "dangling", "cyclic"])
    def test_the_pointer_is_never_believed(self, run, kind) -> None:
        save(run, 1, True, None, Files())
        run.latest.unlink()
        if kind in ("empty", "garbage"):
            run.latest.write_text("" if kind == "empty" else "global_step_99")
        else:
            run.latest.symlink_to("latest" if kind == "cyclic" else "nothing")
        assert newest_whole(published(run))[0] == run.step(1)
        save(run, 2, True, None, Files())
        assert not run.latest.is_symlink()
        assert run.latest.read_text() == "global_step_2"

    def test_the_pointer_is_not_written_through_a_link(self, run, tmp_path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        for name in (".latest.tmp", "latest", ".final.tmp"):
            (run.checkpoints / name).symlink_to(victim)
        mark_final(run, save(run, 1, True, None, Files()))
        assert victim.read_text() == "precious"
        assert run.final.resolve() == run.step(1)


class TestLinks:
    @pytest.fixture
    def victim(self, run, tmp_path) -> Path:
        """A whole checkpoint elsewhere, under the name of an old step of this run."""
        other = RunFolder(tmp_path / "other")
        other.checkpoints.mkdir(parents=True)
        victim = save(other, 4, False, None, Files())
        run.step(4).symlink_to(victim)
        return victim

    def test_retention_leaves_it(self, run, victim) -> None:
        for step in (5, 6):
            save(run, step, True, 1, Files())
        assert published(run) == [run.step(6)]
        assert run.step(4).is_symlink()
        assert damage(victim) is None

    def test_it_is_no_checkpoint(self, run, victim) -> None:
        assert published(run) == []
        assert linked(run) == [run.step(4)]
        assert damage(run.step(4)) == "it is a link"

    def test_nothing_is_saved_through_it(self, run, victim) -> None:
        before = {path: path.read_bytes() for path in victim.iterdir()}
        with pytest.raises(OSError, match="is a link"):
            save(run, 4, True, None, Files())
        temporary_folder(run, 4, "t").mkdir()
        with pytest.raises(OSError, match="is a link"):
            publish(run, 4, temporary_folder(run, 4, "t"))
        assert run.step(4).is_symlink()
        assert {path: path.read_bytes() for path in victim.iterdir()} == before

    def test_a_file_that_is_one_is_damage(self, run, tmp_path) -> None:
        folder = save(run, 1, True, None, Files())
        (folder / "__0_0.distcp").rename(tmp_path / "moved")
        (folder / "__0_0.distcp").symlink_to(tmp_path / "moved")
        assert damage(folder) == "__0_0.distcp: a link"


@pytest.mark.parametrize("name", ["state.json", ".metadata"])
def test_what_the_manifest_leaves_out_is_not_proved(run, name) -> None:
    import json

    folder = save(run, 1, True, None, Files())
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage(folder) == f"{name}: not in manifest.json"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_leads_out_is_damage(run, name) -> None:
    import json

    folder = save(run, 1, True, None, Files())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "is not inside the checkpoint" in (damage(folder) or "")


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_any_umask(run, mask) -> None:
    before = os.umask(mask)
    try:
        folder = save(run, 1, True, None, Files())
    finally:
        os.umask(before)
    assert damage(folder) is None
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
