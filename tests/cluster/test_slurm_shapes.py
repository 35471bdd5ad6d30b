"""Several nodes are one machine; what a user writes is not run; who may not write does not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.chaos.oracle import Evidence, differences
from tests.cluster.conftest import evidence_of
from tests.cluster.slurm_cluster import DEMO_YAML, GRACE, STEPS, SlurmRun, demo_overrides, run_alone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes_leave_what_one_machine_leaves(
    slurm_run: Callable[..., SlurmRun], undisturbed: Callable[[int], Evidence], ranks: int, tmp_path: Path
) -> None:
    """And shell code in values stays text: an environment variable, a comment for sbatch, a setting of the run.

    What a set-up line exports reaches every rank of every node.
    """
    touched, seen = tmp_path / "touched", tmp_path / "seen"
    seen.mkdir()
    odd = f"$(touch {touched}) `touch {touched}` \"q\" 'z' ; touch {touched}"
    run = slurm_run(
        settings={
            "environment": {"TEST_PACE": "0", "TEST_SEEN": str(seen), "ODD": odd},
            "slurm": {"sbatch": {"comment": odd}, "setup": ["export FROM_SETUP=here"]},
        },
        overrides=[f"trainer.experiment_name='{odd.replace(chr(39), chr(39) * 2)}'"],
    )
    run.submit(ranks=ranks)
    assert run.wait_end() == "COMPLETED"
    assert differences(undisturbed(2 * ranks), evidence_of(run.root), exact=True) == []
    assert f"{2 * ranks} ranks on 2 node(s)" in run.log(1)
    assert run.outcome()["weights_sha256"] == undisturbed(2 * ranks).weights[0]
    assert [path.name for path in run.root.rglob("metrics.jsonl")] == ["metrics.jsonl"]
    assert run.step() == STEPS
    assert not touched.exists()
    assert {path.name: path.read_text() for path in seen.iterdir()} == {str(rank): "here" for rank in range(2 * ranks)}
    settings = yaml.safe_load((run.run / "logs" / "config.yaml").read_text())
    assert settings["trainer"]["experiment_name"] == odd
    assert odd.split()[1].rstrip(")") in run.cluster.ask("scontrol", "show", "job", run.job_id)


def test_the_demo_on_two_nodes(slurm_run: Callable[..., SlurmRun], tmp_path: Path) -> None:
    """The repository's own config: both ranks share every sequence, over the network here."""
    base = demo_overrides(tmp_path / "demo")
    run_alone(tmp_path / "one", 2, base, DEMO_YAML)
    run = slurm_run(config=DEMO_YAML, base=base)
    run.submit()
    assert run.wait_end() == "COMPLETED"
    alone = evidence_of(tmp_path / "one")
    assert differences(alone, evidence_of(run.root), exact=True) == []
    assert run.outcome()["weights_sha256"] == alone.weights[0]


@pytest.mark.parametrize("name", ["one\ntouch /tmp/x", "$(touch /tmp/x)", "a'b", 'a"b', "--wrap=x", ""])
def test_a_name_that_is_no_name_is_refused(slurm_run: Callable[..., SlurmRun], name: str) -> None:
    run = slurm_run(settings={"name": name})
    done = subprocess.run(run.command(), env=run.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "job.yaml:" in done.stderr
    assert ": name = " in done.stderr
    assert not (run.root / "slurm").exists()


def test_a_second_job_on_the_same_folder_is_refused_and_scancel_saves(slurm_run: Callable[..., SlurmRun]) -> None:
    first = slurm_run(settings={"environment": {"TEST_PACE": "0.3"}})
    first.submit()
    first.wait_step(2, saved=False)
    second = SlurmRun(first.cluster, first.inputs, first.root, first.nodes)
    second.submit(node_count=1)
    assert second.wait_end() == "FAILED"
    assert (second.exit_code(), second.starts()) == (73, 0)
    assert "is held by another run" in second.log()
    first.wait_step(first.step() + 2)
    known = second.status()
    assert f"held by     job {first.job_id}; this job:" in known
    assert "is held by another run" in known
    first.cluster.ask("scancel", first.job_id)
    # Slurm says COMPLETING as long as processes of the job live.
    first.wait("the job is gone", lambda: first.cluster.state_of(first.job_id) == "CANCELLED", GRACE)
    assert first.wait_end() == "CANCELLED"
    assert first.restarts() == {}
    # Of Slurm's TERM, and what the task passes on (USR2), either may come first.
    assert ": the ranks finish their step, save and leave" in first.log()
    record = first.outcome()
    assert (record["reason"], first.starts()) == ("stopped", 0)
    assert record["step"] == first.step()  # saved where it stood, not only every eighth step
    assert (first.run / "checkpoints" / "latest").read_text() == f"global_step_{record['step']}"


def test_a_config_error_ends_the_job_once(slurm_run: Callable[..., SlurmRun]) -> None:
    refused = slurm_run(overrides=["ulysses_sequence_parallel_size=3"])
    done = subprocess.run(refused.command(), env=refused.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ulysses_sequence_parallel_size = 3" in done.stderr
    # What only the nodes can tell.
    run = slurm_run("there", overrides=["model.external_lib=not_there", "data.prompt_key=not_there"])
    run.submit()
    assert run.wait_end() == "FAILED"
    assert (run.exit_code(), run.starts()) == (2, 0)
    assert "model.external_lib = 'not_there'" in run.log()
    assert "exit code 2 would be the same the next time: not queued again" in run.log()
    assert "Traceback" not in run.log()
    status = run.status()
    assert "model.external_lib = 'not_there'" in status


def test_preflight_on_the_allocation(slurm_run: Callable[..., SlurmRun]) -> None:
    run = slurm_run()
    done = subprocess.run(run.command("--preflight"), env=run.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight passed" in done.stdout
    assert not (run.run / "checkpoints").exists()
    bad = slurm_run("bad", overrides=["model.partial_pretrain=/not/there"])
    done = subprocess.run(bad.command("--preflight"), env=bad.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 66, done.stdout + done.stderr
    assert "preflight failed" in done.stdout
