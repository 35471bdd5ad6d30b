from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sft_job.jobfile.load import load_job
from sft_job.jobfile.schema import JobFile, Resources
from slurm import render as room
from slurm.plan import ONLY_PREFLIGHT, make_plan
from slurm.render import render
from slurm.settings import SlurmSettings, check_slurm
from slurm.submit import plan_text

GOLDEN = Path(__file__).parents[2] / "golden" / "sbatch"
PROFILES = Path(room.__file__).parent / "profiles"
CASES = {
    "bare": ("bare", []),
    "pyxis": ("pyxis", []),
    "apptainer": ("apptainer", []),
    "docker": ("pyxis", ["slurm.container=docker", "image=registry.example.com/team/sft-job:1.0", "preflight=true"]),
    "podman": ("pyxis", ["slurm.container=podman", "image=registry.example.com/team/sft-job:1.0"]),
}


def text(*overrides: str, profile: str = "bare", preflight: str | None = None) -> str:
    loaded = load_job(PROFILES / f"{profile}.yaml", overrides, "slurm", SlurmSettings, check_slurm)
    plan = make_plan(loaded.job, loaded.block, Path("/home/me"), "/opt/venv/bin/python", preflight)
    return f"{render(loaded.job, loaded.block, plan)}\n{plan_text(loaded.job, plan)}"


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """To make them anew: delete a file, run this test, look at what it wrote."""
    profile, overrides = CASES[name]
    found, path = text(*overrides, profile=profile), GOLDEN / f"{name}.txt"
    if not path.exists():
        path.write_text(found)
        pytest.fail(f"{path} was missing and is written: look at it")
    assert found == path.read_text()


def test_the_text_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = text()
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 5)
    assert text() == before


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_one_line_before_the_first_command(name: str) -> None:
    profile, overrides = CASES[name]
    lines = text(*overrides, profile=profile).partition("# plan")[0].splitlines()
    options = [at for at, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(options) < min(commands)
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=.+)?", lines[at]) for at in options)


def test_times_and_memory() -> None:
    assert "#SBATCH --time=1-12:00:00\n" in text("resources.time=1-12:00:00")
    assert "--time" not in text("resources.time=null")
    assert "#SBATCH --mem=0\n" in text()
    assert "#SBATCH --mem=1537M\n" in text("resources.memory_gib=1.5001")
    assert "--mem" not in text("resources.memory_gib=null")


def test_cpus_also_reach_srun() -> None:
    assert re.search(r"^srun .*--cpus-per-task=64 ", text(), re.MULTILINE)
    assert "--cpus-per-task" not in text("resources.cpus_per_node=null")


def test_gpus() -> None:
    assert "#SBATCH --gpus-per-node=h100:8\n" in text("slurm.gpu_type=h100")
    other = text("slurm.gres=gpu:4,nvme:1", "resources.gpus_per_node=4")
    assert "#SBATCH --gres=gpu:4,nvme:1\n" in other
    assert "--gpus-per-node" not in other
    assert "--gpus-per-node" not in text("resources.gpus_per_node=0")


def test_a_set_up_line_may_use_the_shell_s_own_variables() -> None:
    assert "\nexport X=${HOME}/x\n" in text(r"slurm.setup=['export X=\${HOME}/x']")


def test_the_warning_comes_before_the_grace() -> None:
    assert "#SBATCH --signal=URG@315\n" in text("grace_seconds=300")


def test_any_option_of_sbatch(tmp_path: Path) -> None:
    found = text("slurm.sbatch={reservation: spring, spread-job: true, comment: \"a 'b' $(c)\"}")
    assert "#SBATCH --reservation=spring\n" in found
    assert "#SBATCH --spread-job\n" in found
    assert """#SBATCH --comment='a '"'"'b'"'"' $(c)'\n""" in found


def test_a_preflight_job_is_short_and_ends_once() -> None:
    found = text("grace_seconds=900", preflight=ONLY_PREFLIGHT)
    assert "#SBATCH --time=10\n" in found
    assert "#SBATCH --signal=URG@1\n" in found  # the grace is that of training
    assert "#SBATCH --no-requeue\n" in found
    assert "#SBATCH --requeue\n" not in found
    assert "sft_job.cli preflight /home/me/sft_trainer.yaml\n" in found
    assert "sft_job.cli train" not in found


def test_values_reach_no_shell() -> None:
    """What a user writes into values stands in the options' quotes, or in the plan, which is not part of the script."""
    canary = "$(touch canary)"
    job = JobFile("x", "a.yaml", [f"trainer.note={canary}"], checkpoint_dir="/c", environment={"A": canary})
    job.resources = Resources(gpus_per_node=0)
    slurm = SlurmSettings(sbatch={"comment": canary}, srun_args=[f"--x={canary}"])
    plan = make_plan(job, slurm, Path("/"), "/py thon")
    script = render(job, slurm, plan)
    assert script.count(canary) == 2
    assert f"#SBATCH --comment='{canary}'" in script
    assert f" '--x={canary}' " in script
    assert " '/py thon' -P " in script


@pytest.mark.parametrize(
    ("settings", "failed"),
    [
        ({"setup": ["# a note", "export X='a b'", "true && test \"$X\" = 'a b'"]}, ""),
        ({"setup": ["true", "false && true 'x'", "touch later"]}, "exit code 1: false && true 'x'"),
        ({"setup": ["cd nowhere", "touch later"]}, "exit code 1: cd nowhere"),
        ({"setup": ["trap 'exit 0' EXIT TERM", "true"]}, ""),
        ({"modules": ["cuda/12.8"], "setup": ["touch later"]}, "exit code 127: module load cuda/12.8"),
        ({}, ""),
    ],
)
def test_a_set_up_line_that_fails_ends_the_job(tmp_path: Path, settings: dict[str, Any], failed: str) -> None:
    job = JobFile("x", "a.yaml", checkpoint_dir="/c")
    slurm = SlurmSettings(**settings)
    (tmp_path / "script").write_text(render(job, slurm, make_plan(job, slurm, Path("/"), "python")))
    (tmp_path / "srun").write_text("#!/bin/sh\ntouch started\n")
    (tmp_path / "srun").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "script"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "started").exists()) == ((2, False) if failed else (0, True))
    assert f"slurm: this line failed with {failed}\n" in done.stderr or not failed
    assert not (tmp_path / "later").exists()


def test_a_path_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    job = JobFile("x", "~/a.yaml", checkpoint_dir="~/c", image="~/x.sif")
    slurm = SlurmSettings(python="~/venv/bin/python", container="apptainer", folder="~/f")
    plan = make_plan(job, slurm, Path("/"), "python")
    found = [plan.config, plan.checkpoint_dir, plan.image, plan.python, plan.folder]
    assert found == [f"/home/me/{name}" for name in ("a.yaml", "c", "x.sif", "venv/bin/python", "f")]
    odd = JobFile("x", "~nobody-of-that-name/a.yaml", checkpoint_dir="/c", image="docker://a//b")
    plan = make_plan(odd, SlurmSettings(container="apptainer"), Path("/w"), "python")
    assert (plan.config, plan.image, plan.python) == ("/w/~nobody-of-that-name/a.yaml", "docker://a//b", "python")
