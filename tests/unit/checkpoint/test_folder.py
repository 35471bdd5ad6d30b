from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.checkpoint import folder as folders
from sft_job.checkpoint.files import write_durably
from sft_job.checkpoint.folder import newest_whole, prune, publish, published, temporary_folder
from sft_job.checkpoint.manifest import damage
from sft_job.checkpoint.state import RunState
from sft_job.contract import RunFolder

STATE = RunState(1, 8, 4, 0, 4, 100, 50, 2.0, 1, 1, "d", "m", {}, True, "0")


def save(run: RunFolder, step: int, kept: bool = True) -> Path:
    temporary = temporary_folder(run, step, "t")
    (temporary / "huggingface").mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(b"weights" * step)
    (temporary / ".metadata").write_bytes(b"index")
    (temporary / "huggingface" / "config.json").write_text("{}")
    (temporary / "state.json").write_text(replace(STATE, step=step, kept=kept).to_json())
    return publish(run, step, temporary)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def test_published_is_whole_and_named(run) -> None:
    folder = save(run, 3)
    assert folder.name == "global_step_3"
    assert run.latest.read_text() == "global_step_3"
    assert damage(folder) is None
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(entries) == {"__0_0.distcp", ".metadata", "huggingface/config.json", "state.json"}
    assert [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "huggingface/config.json", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_every_harm_to_every_file_is_named(run, name, harm) -> None:
    path = save(run, 3) / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[0] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    found = damage(run.step(3))
    assert found is not None
    assert name in found


def test_a_damaged_manifest_is_damage(run) -> None:
    folder = save(run, 3)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json" in (damage(folder) or "")


def test_the_newest_whole_one_is_found_and_the_others_are_named(run) -> None:
    for step in (2, 10, 9):
        save(run, step)
    (run.step(10) / "__0_0.distcp").unlink()
    found, notes = newest_whole(published(run))
    assert found == run.step(9)
    assert len(notes) == 1
    assert "global_step_10: damaged, not used (__0_0.distcp: missing)" in notes[0]


def test_a_half_written_one_is_never_found(run) -> None:
    save(run, 2)
    (temporary_folder(run, 4, "t") / "huggingface").mkdir(parents=True)
    assert published(run) == [run.step(2)]
    folders.clear_leftovers(run)
    assert not temporary_folder(run, 4, "t").exists()


def test_publishing_over_a_damaged_one(run) -> None:
    (save(run, 3) / "__0_0.distcp").unlink()
    assert damage(save(run, 3)) is None
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["global_step_3", "latest"]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.one_of(st.none(), st.integers(1, 4)))
def test_pruning(tmp_path_factory, kept, keep) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.checkpoints.mkdir()
    for step, is_kept in enumerate(kept, start=1):
        save(run, step, is_kept)
    prune(run, run.step(len(kept)), keep)
    left = [int(path.name.removeprefix("global_step_")) for path in published(run)]
    assert left[-1] == len(kept)  # the newest stays, whatever it is
    expected = [step for step, is_kept in enumerate(kept, start=1) if is_kept]
    if keep is not None:
        expected = expected[-keep:]
    assert left == sorted({*expected, len(kept)})


def test_pruning_never_removes_what_was_just_saved(run) -> None:
    """A damaged later folder does not make the new one an old one; it goes."""
    for step in (2, 4):
        save(run, step)
    (run.step(4) / "__0_0.distcp").unlink()
    prune(run, save(run, 3, kept=False), 1)
    assert published(run) == [run.step(2), run.step(3)]
    assert run.latest.read_text() == "global_step_3"


def test_killed_between_two_renames_the_old_one_comes_back(run) -> None:
    folder = save(run, 3)
    folder.rename(run.checkpoints / ".replaced_global_step_3")
    temporary_folder(run, 3, "t").mkdir()
    folders.clear_leftovers(run)
    assert damage(folder) is None
    assert published(run) == [folder]


def test_one_without_optimizer_cannot_be_gone_on_from(run) -> None:
    save(run, 2)
    temporary = temporary_folder(run, 3, "t")
    temporary.mkdir()
    (temporary / "state.json").write_text(replace(STATE, step=3, contents=("model",)).to_json())
    publish(run, 3, temporary_folder(run, 3, "t"))
    found, notes = newest_whole(published(run), frozenset({"model", "optimizer"}))
    assert found == run.step(2)
    assert "save_contents left out optimizer" in notes[0]


def test_an_interrupted_write_leaves_the_old_pointer(run, monkeypatch) -> None:
    write_durably(run.latest, "global_step_1")

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_durably(run.latest, "global_step_2")
    assert run.latest.read_text() == "global_step_1"


class Unreadable:
    """Files below a folder that the disk does not give back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, error: OSError, operation: str) -> None:
        self.active = True
        real = getattr(Path, operation)

        def failing(found: Path, *args, **options):
            if self.active and found == path:
                raise error
            return real(found, *args, **options)

        monkeypatch.setattr(Path, operation, failing)


ERRORS = [OSError(5, "Input/output error"), PermissionError(13, "Permission denied"), OSError(116, "Stale file handle")]


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "EACCES", "ESTALE"])
@pytest.mark.parametrize("operation", ["lstat", "stat", "open", "read_text"])
@pytest.mark.parametrize("name", [".", "manifest.json", "state.json", "__0_0.distcp"])
def test_what_cannot_be_read_is_passed_over(run, monkeypatch, name, operation, error) -> None:
    for step in (1, 2):
        save(run, step)
    Unreadable(monkeypatch, run.step(2) / name, error, operation)
    found, notes = newest_whole(published(run))
    if (name, operation) in {(".", "lstat"), ("manifest.json", "read_text"), ("__0_0.distcp", "open")}:
        assert error.strerror in notes[0]
    assert found == run.step(1) or (found == run.step(2) and notes == [])  # this operation is not done there


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("healed", [True, False])
def test_what_could_not_be_read_is_not_removed(run, monkeypatch, later, healed) -> None:
    """By the time of the next save it can be read again, or it cannot; at a later step than that, or at the same."""
    for step in (1, 3):
        save(run, step)
    unreadable = Unreadable(monkeypatch, run.step(3) / "__0_0.distcp", ERRORS[0], "open")
    assert newest_whole(published(run))[0] == run.step(1)
    unreadable.active = not healed
    if later:
        prune(run, save(run, 2), None)
        expected = ["global_step_1", "global_step_2", "latest", "unread_global_step_3"]
    else:
        save(run, 3)
        aside = [] if healed else ["unread_global_step_3"]  # the same step again, and the old one whole: not needed
        expected = ["global_step_1", "global_step_3", "latest", *aside]
    folders.clear_leftovers(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == expected
    assert run.step(3) not in published(run) or not later


def test_a_second_one_of_the_same_name_stays_too(run, monkeypatch) -> None:
    for _ in range(2):
        save(run, 3)
        unreadable = Unreadable(monkeypatch, run.step(3) / "__0_0.distcp", ERRORS[0], "open")
        prune(run, save(run, 2), None)
        unreadable.active = False
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["global_step_2", "latest", "unread_global_step_3", "unread_global_step_3_2"]


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', '{"step": 2}', '{"sources": []}', "{"])
def test_a_state_of_another_form_is_damage(run, text) -> None:
    save(run, 1)
    temporary = temporary_folder(run, 2, "t")
    temporary.mkdir()
    (temporary / "state.json").write_text(text)
    publish(run, 2, temporary_folder(run, 2, "t"))
    found, notes = newest_whole(published(run))
    assert found == run.step(1)
    assert "state.json cannot be read" in notes[0]
