from __future__ import annotations

from typing import Any

import pytest

from sft_job.jobfile.schema import JobFile, Resources
from slurm.settings import SlurmSettings, check_slurm


def subjects(slurm: dict[str, Any], **job: Any) -> list[str]:
    given = JobFile(**{"config": "sft.yaml", "checkpoint_dir": "/runs/one", **job})
    return [problem.subject for problem in check_slurm(given, SlurmSettings(**slurm))]


@pytest.mark.parametrize(
    "slurm",
    [
        {},
        {"partition": "gpu,long", "qos": "high", "constraint": "a100&ib", "dependency": "afterok:12:13,afterany:9"},
        {"dependency": "afterok:1?afterok:2", "nodelist": "n[1-3,7]", "exclude": "gpu[01-04]", "exclusive": "user"},
        {"gres": "gpu:a100:1,nvme:1", "sbatch": {"reservation": "spring", "comment": "$(x) 'q'", "nice": "-5"}},
        {"gres": "shard:2"},
        {"gres": "gres/gpu=1"},
        {"setup": ["wandb login $KEY", 'curl -H "Bearer $(cat ~/key)"', f"git checkout {'c0ffee12' * 5}"]},
        {"modules": ["cuda/12.8", "nccl/2.27+x"], "setup": ["export A=1", "ulimit -l unlimited"], "master_port": 5000},
        {
            "setup": [
                "export HF_TOKEN=$(cat ~/.token)",
                'A_KEY="$B_SECRET_VALUE"',
                "export TOKENIZERS_PARALLELISM=false",
            ]
        },
        {"sbatch": {"export": "ALL", "gpus": "8", "mem-per-gpu": "9", "time-min": "5", "wait-all-nodes": "1"}},
        {"srun_args": ["--mpi", "none", "--label", "--export=ALL"]},
        {"srun_args": ["--mpi=none"], "network_interface": "ib0,ib1"},
        {"network_interface": "^docker0"},
    ],
)
def test_good_ones(slurm: dict[str, Any]) -> None:
    assert subjects(slurm) == []


@pytest.mark.parametrize(("time", "found"), [("3", []), ("2:15", ["resources.time"]), ("2:16", []), (None, [])])
def test_a_time_that_holds_the_grace_and_more(time: str | None, found: list[str]) -> None:
    assert subjects({}, grace_seconds=120, resources=Resources(time=time)) == found


@pytest.mark.parametrize(
    ("slurm", "subject"),
    [
        ({"partition": "a b"}, "slurm.partition"),
        ({"partition": "--wrap=x"}, "slurm.partition"),
        ({"account": "a\n#SBATCH --x"}, "slurm.account"),
        ({"qos": "$(x)"}, "slurm.qos"),
        ({"constraint": "a\tb"}, "slurm.constraint"),
        ({"dependency": "afterok:1;x"}, "slurm.dependency"),
        ({"exclusive": "yes"}, "slurm.exclusive"),
        ({"gres": "gpu:4", "gpu_type": "a100"}, "slurm.gpu_type"),
        ({"gres": "gpu:4"}, "slurm.gres"),
        ({"gres": "gpu:a100:1,gpu:h100:1"}, "slurm.gres"),
        ({"gres": "nvme:1"}, "slurm.gres"),
        ({"sbatch": {"export": "NONE"}}, "slurm.sbatch.export"),
        ({"sbatch": {"export": "A=1,B"}}, "slurm.sbatch.export"),
        ({"srun_args": ["--export=NONE"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["hostname"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["--mpi=none", "none"]}, "slurm.srun_args[1]"),
        ({"srun_args": ["--mpi", "none", "hostname"]}, "slurm.srun_args[2]"),
        ({"setup": [f"wandb login {'x' * 8}{'Y' * 8}"]}, "slurm.setup[0]"),
        ({"setup": [f"wandb login --relogin '{'z1' * 8}'"]}, "slurm.setup[0]"),
        ({"setup": [f"curl -H 'Authorization: Bearer {'ab.' * 8}' x"]}, "slurm.setup[0]"),
        ({"setup": [f"tool {'c0ffee12' * 5}"]}, "slurm.setup[0]"),
        ({"sbatch": {"--nice": "1"}}, "slurm.sbatch.--nice"),
        ({"sbatch": {"nice": "1\n2"}}, "slurm.sbatch.nice"),
        ({"sbatch": {"signal": "USR1@5"}}, "slurm.sbatch.signal"),
        ({"sbatch": {"time": "5"}}, "slurm.sbatch.time"),
        ({"sbatch": {"array": "1-3"}}, "slurm.sbatch.array"),
        ({"sbatch": {"no-requeue": "true"}}, "slurm.sbatch.no-requeue"),
        ({"sbatch": {"wrap": "x"}}, "slurm.sbatch.wrap"),
        ({"sbatch": {"no-req": "true"}}, "slurm.sbatch.no-req"),
        ({"sbatch": {"arr": "1-3"}}, "slurm.sbatch.arr"),
        ({"sbatch": {"sig": "USR1@5"}}, "slurm.sbatch.sig"),
        ({"sbatch": {"tim": "5"}}, "slurm.sbatch.tim"),
        ({"srun_args": ["--mpi=none", "--kill-on-bad-exit=1"]}, "slurm.srun_args[1]"),
        ({"srun_args": ["--kill-on=1"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["-K1"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["--wait", "60"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["--output=/x"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["--cpus-per-task=1"]}, "slurm.srun_args[0]"),
        ({"srun_args": ["--"]}, "slurm.srun_args[0]"),
        ({"modules": ["cuda; rm"]}, "slurm.modules[0]"),
        ({"setup": ["true", " #SBATCH --nice=1"]}, "slurm.setup[1]"),
        ({"setup": ["export A=1 \\"]}, "slurm.setup[0]"),
        ({"setup": ["a\nb"]}, "slurm.setup[0]"),
        ({"srun_args": ["a\rb"]}, "slurm.srun_args[0]"),
        ({"setup": ["export WANDB_API_KEY=0123456789abcdef"]}, "slurm.setup[0]"),
        ({"setup": ["true; HF_TOKEN='0123 4567 89'"]}, "slurm.setup[0]"),
        ({"sbatch": {"export": "ALL,WANDB_API_KEY=0123456789abcdef"}}, "slurm.sbatch.export"),
        ({"srun_args": ["--export=ALL,MY_TOKEN=0123456789abcdef"]}, "slurm.srun_args[0]"),
        ({"container": "docker", "container_args": ["--env=MY_TOKEN=0123456789"]}, "slurm.container_args[0]"),
        ({"container": "docker", "container_args": ["--env", "MY_TOKEN=0123456789"]}, "slurm.container_args[1]"),
        ({"master_port": 80}, "slurm.master_port"),
        ({"network_interface": "ib0 ib1"}, "slurm.network_interface"),
        ({"folder": "/logs/%j"}, "slurm.folder"),
        ({"container": "lxc"}, "slurm.container"),
        ({"container": "pyxis"}, "image"),
        ({"container_args": ["--x"]}, "slurm.container_args"),
        ({"python": "-c x"}, "slurm.python"),
    ],
)
def test_what_is_refused(slurm: dict[str, Any], subject: str) -> None:
    assert subject in subjects(slurm)


def test_what_does_not_fit_the_rest() -> None:
    assert "image" in subjects({}, image="x.sif")
    assert "mounts" in subjects({}, mounts=["/data"])
    assert "slurm.gpu_type" in subjects({"gpu_type": "a100"}, resources=Resources(gpus_per_node=0))
    assert subjects({"container": "apptainer"}, image="x.sif", mounts=["/data"]) == []


def test_the_setting_that_an_abbreviation_means_is_named() -> None:
    given = JobFile("x", "sft.yaml", checkpoint_dir="/c")
    (problem,) = check_slurm(given, SlurmSettings(sbatch={"part": "gpu"}))
    assert (problem.rule, problem.fix) == (
        "is read as partition, which has a setting of its own",
        "set slurm.partition",
    )


@pytest.mark.parametrize(
    ("written", "fix"), [("True", "write true"), ("false", "leave it out, or write null"), ("USER", "write user")]
)
def test_what_exclusive_should_be(written: str, fix: str) -> None:
    given = JobFile("x", "sft.yaml", checkpoint_dir="/c")
    (problem,) = check_slurm(given, SlurmSettings(exclusive=written))
    assert problem.fix == fix
