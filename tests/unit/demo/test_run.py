from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sft_job.config.load import load_config
from sft_job.config.resolve import resolve
from sft_job.contract import ExitCode
from sft_job.demo import run as demo
from sft_job.demo.graphs import KINDS, draw_problems
from sft_job.demo.run import RECIPE, DemoFolder, make_input, results_table, run_demo, train_command, train_environment
from sft_job.demo.score import Score


def test_recipe_is_a_valid_config_of_two_ranks(tmp_path: Path) -> None:
    paths = DemoFolder(tmp_path)
    make_input(paths, 50, 10, Console(file=io.StringIO()))
    resolution = resolve(str(RECIPE), train_command(paths)[5:], train_environment({}), 0)
    assert resolution.problems == []
    assert resolution.topology.world == 2
    config = resolution.loaded.config
    assert config.ulysses_sequence_parallel_size == 2
    assert Path(config.trainer.default_local_dir or "") == paths.run.root
    assert load_config(str(RECIPE), [], {}).problems == []


def test_batches_are_whole() -> None:
    """No small batch at the end of an epoch."""
    config = load_config(str(RECIPE), [], {}).config
    assert demo.TRAIN_ROWS % config.data.train_batch_size == 0


def test_command_is_the_real_one(tmp_path: Path) -> None:
    command = train_command(DemoFolder(tmp_path), ["trainer.seed=2"])
    assert command[:5] == [sys.executable, "-m", "sft_job.cli", "train", str(RECIPE)]
    assert command[-1] == "trainer.seed=2"


def test_environment_of_a_launcher_is_left_out() -> None:
    around = {"PATH": "/bin", "NNODES": "4", "PET_NNODES": "4", "CHECKPOINT_DIR": "/data", "NPROC_PER_NODE": "8"}
    environment = train_environment(around)
    assert environment["PATH"] == "/bin"
    assert environment["NPROC_PER_NODE"] == "2"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"NNODES", "PET_NNODES", "CHECKPOINT_DIR"} & set(environment)


def test_folder_of_others_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run_demo(tmp_path) == ExitCode.CANNOT_CREATE
    assert "not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert run_demo(tmp_path / "thesis.tex") == ExitCode.CANNOT_CREATE


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores without generation."""
    monkeypatch.setattr(demo, "score", lambda folder, problems: made_up_score(len(problems)))


def made_up_score(count: int, right: int = 0) -> Score:
    return Score(2.5, ["[not markup]\nAnswer: x"] * count, [index < right for index in range(count)])


@pytest.mark.usefixtures("_small")
def test_second_run_replaces_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_wait", lambda command, environment: ExitCode.DONE)
    out = Console(file=io.StringIO(), width=100)
    folder = tmp_path / "demo-run"
    assert run_demo(folder, train_rows=50, held_out_rows=10, console=out) == ExitCode.DONE
    (folder / "run" / "old").mkdir(parents=True)
    assert run_demo(folder, train_rows=50, held_out_rows=10, console=out) == ExitCode.DONE
    assert not (folder / "run").exists()
    assert DemoFolder(folder).train.is_file()
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "[not markup]" in shown
    assert str(folder / "run" / "checkpoints" / "final" / "huggingface") in shown
    assert "sft-job train sft_trainer.yaml data.train_files=" in shown


@pytest.mark.usefixtures("_small")
def test_failed_training_ends_the_demo_with_its_code(tmp_path: Path) -> None:
    out = Console(file=io.StringIO(), width=100)
    folder = tmp_path / "demo-run"
    code = run_demo(folder, train_rows=50, held_out_rows=10, overrides=["trainer.no_such_key=1"], console=out)
    assert code == ExitCode.CONFIG
    assert "4. After training" not in out.file.getvalue()  # type: ignore[attr-defined]


def test_results() -> None:
    problems = draw_problems(0, 10, seed=1)[1]
    out = Console(file=io.StringIO(), width=80)
    out.print(results_table(problems, made_up_score(10), made_up_score(10, right=5)))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "10 held-out problems" in shown
    assert "2.500" in shown
    assert [line.split("│")[2:4] for line in shown.splitlines() if "exact match" in line] == [["   0.0% ", " 50.0% "]]
    assert all(kind in shown for kind in KINDS)
