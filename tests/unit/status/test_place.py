from __future__ import annotations

from pathlib import Path

import pytest

from sft_job.errors import ProblemsError
from sft_job.status.place import locate
from sft_job.submissions import record
from tests.unit.status.conftest import write_ends


@pytest.mark.parametrize(
    "below", ["..", ".", "logs", "logs/outcome.json", "checkpoints", "checkpoints/global_step_4", "wandb/deep/er"]
)
def test_any_folder_of_the_run_names_it(run, below: str) -> None:
    write_ends(run, 0, "done")
    (run.step(4)).mkdir(parents=True)
    (run.root / "wandb" / "deep" / "er").mkdir(parents=True)
    assert locate(str(run.root / below), {})[0] == run


@pytest.mark.parametrize("mark", ["logs/.lock", "logs/config.yaml", "logs/metrics.jsonl", "logs/prepare.log"])
def test_remnants_of_a_run_are_enough(run, mark: str) -> None:
    (run.root / mark).write_text("")
    assert locate(str(run.root), {})[0] == run
    assert locate(str(run.root.parent), {})[0] == run


def test_checkpoints_alone_are_enough_and_any_folder_name(tmp_path) -> None:
    (tmp_path / "mine" / "checkpoints" / "global_step_7").mkdir(parents=True)
    assert locate(str(tmp_path / "mine"), {})[0].root == tmp_path / "mine"


def test_the_environment_names_it_where_nobody_does(run) -> None:
    write_ends(run, 0, "done")
    assert locate(None, {"CHECKPOINT_DIR": str(run.root.parent)})[0] == run
    with pytest.raises(ProblemsError, match="is needed"):
        locate(None, {})


@pytest.mark.parametrize("named", ["{tmp}", "{tmp}/nothing", "no-such-job", "{tmp}/x\0y", ""])
def test_what_is_no_run_is_a_problem_with_a_fix(tmp_path, monkeypatch, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    with pytest.raises(ProblemsError, match=r"fix: name the run folder") as caught:
        locate(named.format(tmp=tmp_path), {"HOME": str(tmp_path)})
    assert caught.value.code == 2


def test_a_job_names_its_folder_before_it_is_there_and_a_folder_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path)}
    record("slurm", "41", tmp_path / "later" / "sft", environ=environ)
    run, submission = locate("41", environ)
    assert run.root == tmp_path / "later" / "sft"
    assert submission is not None
    assert submission.job == "41"
    Path("41/sft/checkpoints/global_step_1").mkdir(parents=True)
    assert locate("41", environ) == (locate("./41", environ)[0], None)
