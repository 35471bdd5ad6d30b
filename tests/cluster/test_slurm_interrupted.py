"""Whatever the scheduler does to a job, it ends with the weights of the run that nobody disturbed, each row once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.oracle import Evidence, differences
from tests.cluster.conftest import evidence_of
from tests.cluster.slurm_cluster import SlurmRun

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

Make = Callable[..., SlurmRun]
Alone = Callable[[int], Evidence]


def check(run: SlurmRun, alone: Evidence, restarts: dict[str, int], by_slurm: int = 0) -> None:
    """The job is done as if nothing had happened; was queued again for these reasons, and so often by Slurm."""
    assert run.cluster.state_of(run.job_id) == "COMPLETED"
    assert differences(alone, evidence_of(run.root), exact=True) == []
    assert run.restarts() == restarts
    assert run.starts() == sum(restarts.values()) + by_slurm
    assert "Traceback" not in run.log() + run.log(1)


def test_preempted_by_the_urgent_partition(slurm_run: Make, undisturbed: Alone) -> None:
    # So near to the time limit that only Slurm's word tells what its signals mean: a warning (URG), or TERM where it
    # has warned of the limit before.
    run = slurm_run(settings={"resources": {"time": 2}})
    run.submit()
    run.wait_step(12)
    nodes = run.cluster.field(run.job_id, "NodeList")
    wait = ["sbatch", "--parsable", "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null"]
    urgent = run.cluster.ask(*wait, "--nodes=2", "--wrap=sleep 2")
    run.wait_end()
    assert run.cluster.state_of(urgent) == "COMPLETED"
    check(run, undisturbed(2), {"preemption": 1})


@pytest.mark.alone
def test_stopped_by_a_limit_of_one_minute_twice(slurm_run: Make, undisturbed: Alone) -> None:
    # 44 steps of 2.6 s do not fit into two minutes, however fast the machine starts the job.
    run = slurm_run(settings={"resources": {"time": 1}, "environment": {"TEST_PACE": "2.6"}, "grace_seconds": 8})
    run.submit()
    run.wait_end(480)
    found = run.restarts()
    assert set(found) == {"timeout"}
    assert found["timeout"] >= 2
    check(run, undisturbed(2), found)


def test_queued_again_by_an_operator(slurm_run: Make, undisturbed: Alone) -> None:
    run = slurm_run()
    run.submit()
    run.wait_step(12)
    run.cluster.ask("scontrol", "requeue", run.job_id)
    run.wait_end()
    check(run, undisturbed(2), {}, by_slurm=1)


def test_a_node_crashes(slurm_run: Make, undisturbed: Alone) -> None:
    run = slurm_run()
    run.submit()
    run.wait_step(12)
    nodes = run.cluster.ask("scontrol", "show", "hostnames", run.cluster.field(run.job_id, "NodeList")).split()
    run.cluster.crash(nodes[1])
    try:
        run.wait("another start", lambda: run.starts() > 0)
    finally:
        run.cluster.repair()
    run.wait_end()
    # Who is faster: Slurm, which takes the node for dead after a while, or the job, whose ranks notice.
    judge = run.judged_by(0)
    check(run, undisturbed(2), {} if judge == "slurm" else {"loss": 1}, by_slurm=judge == "slurm")
    assert run.ends()[0] == ("NODE_FAIL" if judge == "slurm" else "REQUEUED")


def test_the_network_of_the_first_node_is_cut(slurm_run: Make, undisturbed: Alone) -> None:
    run = slurm_run()
    run.submit()
    run.wait_step(12)
    nodes = run.cluster.ask("scontrol", "show", "hostnames", run.cluster.field(run.job_id, "NodeList")).split()
    run.cluster.cut(nodes[0])
    try:
        # On the nodes that are left. The first start lives on behind the cut: it must do nothing when the net is back.
        run.wait("another start", lambda: run.starts() > 0 and run.cluster.state_of(run.job_id) == "RUNNING")
        run.wait("the new start's nodes", lambda: nodes[0] not in run.cluster.field(run.job_id, "NodeList"))
    finally:
        run.cluster.mend(nodes[0])
        run.cluster.repair()
    run.wait_end()
    # The node that judges reaches no controller: Slurm alone can queue the job again.
    assert run.judged_by(0) == "slurm"
    check(run, undisturbed(2), {}, by_slurm=1)
    assert run.ends()[0] == "NODE_FAIL"


def test_a_job_that_dies_at_every_start_is_given_up(slurm_run: Make) -> None:
    run = slurm_run(settings={"environment": {"TEST_DIES": "1"}}, overrides=["trainer.max_starts_without_progress=2"])
    run.submit(node_count=1)
    assert run.wait_end() == "FAILED"
    assert (run.exit_code(), run.starts()) == (86, 2)
    assert run.restarts() == {"loss": 2}
    assert "the last 2 starts made no new step" in run.log()


APPTAINER = """
# What stands before the image are options of the runtime; the image is a folder with programs.
while [ "$1" != image ]; do shift; done
shift
exec "$@"
"""
PYXIS = """
# The real srun knows no containers here: their options are taken out.
kept=()
for word in "$@"; do case $word in --container-*|--no-container-*) ;; *) kept+=("$word") ;; esac; done
exec {srun} "${{kept[@]}}"
"""


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_container_is_warned_and_queued_again(
    slurm_run: Make, undisturbed: Alone, runtime: str, tmp_path: Path
) -> None:
    """The signals' way through a runtime, with the runtime's place taken by a script; srun within srun is real."""
    number = {"apptainer": "USR2", "pyxis": "URG"}[runtime]
    run = slurm_run(settings={"image": "image", "slurm": {"container": runtime}})
    tools = tmp_path / "tools"
    tools.mkdir()
    srun = run.cluster.ask("which", "srun")
    scripts = {"apptainer": ("apptainer", APPTAINER), "pyxis": ("srun", PYXIS.format(srun=srun))}
    # The host's PYTHONPATH does not reach a container.
    image = 'PYTHONPATH=$TEST_REPOSITORY exec "$TEST_PYTHON" -m sft_job.cli "$@"'
    for name, text in (scripts[runtime], ("sft-job", image)):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environ = run.environ()
    run.environment |= {"PATH": f"{tools}:{environ['PATH']}", "TEST_PYTHON": sys.executable}
    run.settings["environment"] = {"TEST_PACE": "0.15", "TEST_REPOSITORY": environ["PYTHONPATH"]}
    run.submit(node_count=1, ranks=2)
    run.wait_step(10)
    run.cluster.ask("scancel", f"--signal={number}", run.job_id)
    run.wait_end()
    check(run, undisturbed(2), {"preemption": 1})
