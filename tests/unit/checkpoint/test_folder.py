from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.checkpoint import folder as folders
from sft_job.checkpoint.folder import damage, newest_whole, prune, publish, published, temporary_folder, write_durably
from sft_job.checkpoint.state import RunState
from sft_job.contract import RunFolder

STATE = RunState(1, 8, 4, 0, 4, 100, 50, 2.0, 1, 1, "d", "m", {}, True, "0")


def save(run: RunFolder, step: int, kept: bool = True) -> Path:
    temporary = temporary_folder(run, step)
    (temporary / "huggingface").mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(b"weights" * step)
    (temporary / ".metadata").write_bytes(b"index")
    (temporary / "huggingface" / "config.json").write_text("{}")
    (temporary / "state.json").write_text(replace(STATE, step=step, kept=kept).to_json())
    return publish(run, step)


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
    (temporary_folder(run, 4) / "huggingface").mkdir(parents=True)
    assert published(run) == [run.step(2)]
    folders.clear_leftovers(run)
    assert not temporary_folder(run, 4).exists()


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
    temporary_folder(run, 3).mkdir()
    folders.clear_leftovers(run)
    assert damage(folder) is None
    assert published(run) == [folder]


def test_one_without_optimizer_cannot_be_gone_on_from(run) -> None:
    save(run, 2)
    temporary = temporary_folder(run, 3)
    temporary.mkdir()
    (temporary / "state.json").write_text(replace(STATE, step=3, contents=("model",)).to_json())
    publish(run, 3)
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
