"""The real command with an sbatch that writes down what it got."""

from __future__ import annotations

import os
import pickletools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_job.errors import JobError
from sft_job.submissions import find
from slurm import submit as room
from slurm.plan import Plan

CANARY = "c0ffee" * 6
CONFIG = "data: {train_files: /nodes/data.parquet}\nmodel: {partial_pretrain: /nodes/model}\n"
NOT_HERE = [
    "only the nodes can tell: sft.yaml:2: model.partial_pretrain = '/nodes/model': there is no such folder (fix: "
    "correct the path, or mount the folder into the container)",
    "only the nodes can tell: sft.yaml:1: data.train_files = '/nodes/data.parquet': there is no such file or folder on "
    "this machine (fix: correct the path, unless the job finds it there)",
]


@pytest.fixture
def login(tmp_path: Path):
    """A login node: a folder with job and config, and tools on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "sft.yaml").write_text(CONFIG)
    job = {"config": "sft.yaml", "checkpoint_dir": "runs", "secrets": ["WANDB_API_KEY"], "name": "mine"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def run(*arguments: str, sbatch: str | None = "echo Submitted batch job 77", **more: str):
        if sbatch is not None:
            (tools / "sbatch").write_text(f"#!/bin/bash\n{sbatch}\n")
            (tools / "sbatch").chmod(0o755)
        environ = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "sft_job.cli", "submit", "slurm", "job.yaml", *arguments],
            cwd=tmp_path,
            env={**environ, "WANDB_API_KEY": CANARY} | more,
            capture_output=True,
            text=True,
            check=False,
            # What is started in a background without job control inherits an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return run


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error without the imports."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_submitted_and_shown(login, tmp_path: Path) -> None:
    done = login()
    assert done.returncode == 0, words(done)
    assert done.stdout.splitlines() == [
        *NOT_HERE,
        "submitted job 77 (mine): 1 node(s), 1 rank(s) on each",
        f"log: {tmp_path}/runs/slurm/77_0_log.out",
        f"run folder: {tmp_path}/runs/sft",
        "how it stands: sft-job status 77",
        "stop it: scancel 77 (it saves, where that fits into the cluster's KillWait)",
        "save and queue again: scancel --signal=USR2 77",
    ]
    assert (tmp_path / "runs" / "slurm").stat().st_mode & 0o777 == 0o700


def test_the_job_is_known_by_its_id(login, tmp_path: Path) -> None:
    login()
    known = find("77", {"HOME": str(tmp_path)})
    assert (known.launcher, known.run) == ("slurm", f"{tmp_path}/runs/sft")
    assert known.logs == (f"{tmp_path}/runs/slurm/77_*_log.out",)
    done = login(HOME="")
    assert done.returncode == 0
    assert f"sft-job status {tmp_path}/runs/sft (not by the job's id: " in done.stdout


def test_submitting_imports_no_torch(login) -> None:
    imported = {line.rpartition("|")[2].strip() for line in login().stderr.splitlines() if "import time:" in line}
    assert "submitit" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "transformers", "pyarrow", "numpy")}


def test_what_travels_is_names_and_plain_values(login, tmp_path: Path) -> None:
    """Any Python that has the packages reads it: no code, no classes but submitit's own, by name."""
    login()
    pickled = (tmp_path / "runs" / "slurm" / "77_submitted.pkl").read_bytes()
    names, strings = [], []
    for operation, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str):
            strings.append(argument)
        if operation.name == "STACK_GLOBAL":
            names.append(tuple(strings[-2:]))
        assert operation.name not in ("REDUCE", "GLOBAL", "INST", "OBJ")
    assert names == [("submitit.core.utils", "DelayedSubmission"), ("slurm.task", "run_node")]


def test_no_secret_in_any_file(login, tmp_path: Path) -> None:
    login()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    done = login('overrides=["trainer.note=${oc.env:WANDB_API_KEY}"]')
    assert done.returncode == 2
    assert "command line: overrides[0]\n    holds a secret of this environment" in words(done)
    assert CANARY not in done.stderr + done.stdout


def test_a_dry_run_submits_and_writes_nothing(login, tmp_path: Path) -> None:
    done = login("--dry-run", sbatch=None)
    assert done.returncode == 0, words(done)
    assert done.stdout.startswith("\n".join([*NOT_HERE, "# sbatch script\n#!/bin/bash\n"]))
    assert "-m sft_job.cli train" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_everything_that_is_wrong_here(login) -> None:
    done = login("config=missing.yaml", "secrets=[NOT_SET_ANYWHERE]", sbatch=None)
    assert done.returncode == 2
    said = words(done)
    assert said.startswith("2 problems:\n")
    assert "command line: config = 'missing.yaml'\n    there is no such file" in said
    assert "command line: secrets[0] = 'NOT_SET_ANYWHERE'\n    this variable is not set here" in said


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("/lustre/a,/etc:/etc:rw", "checkpoint_dir"),
        ("/a:b", "checkpoint_dir"),
        ('/a"b', "checkpoint_dir"),
        ("here:/etc/sft.yaml", "config"),
    ],
)
def test_a_path_that_would_mount_something_else_is_refused(login, path: str, setting: str) -> None:
    override = f"{setting}='{path}'"
    done = login("slurm.container=pyxis", "image=x.sqsh", override, "--dry-run")
    assert done.returncode == 2
    assert f"command line: {setting} = " in words(done)
    assert "is mounted into the container: must be plain absolute paths" in words(done)
    if setting == "checkpoint_dir":
        assert login(override, "--dry-run").returncode == 0  # without a container nothing is mounted


def test_an_error_of_the_run_s_settings_is_one_at_submit(login, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(f"{CONFIG}optim: {{lrr: 1}}\ntrainer: {{seed: -1}}\n")
    done = login('overrides=["optim.lr=fast"]', "ulysses_sequence_parallel_size=3", "resources.nodes=2")
    said = words(done)
    assert done.returncode == 2
    for subject in (
        "sft.yaml:3: optim.lrr",
        "sft.yaml:4: trainer.seed = -1",
        "command line: optim.lr = 'fast'",
        "command line: ulysses_sequence_parallel_size = 3",
    ):
        assert subject in said
    assert not (tmp_path / "runs").exists()


def test_what_only_the_nodes_have_is_no_error(login, tmp_path: Path) -> None:
    settings = "trainer: {project_name: '${oc.env:ONLY_THERE}'}\n"
    (tmp_path / "sft.yaml").write_text(
        CONFIG.replace("/nodes/model", "/nodes/model, external_lib: only.there") + settings
    )
    done = login()
    assert done.returncode == 0, words(done)
    told = [line for line in done.stdout.splitlines() if line.startswith("only the nodes can tell: sft.yaml:")]
    assert [line.split(": ")[2] for line in told] == [
        "model.external_lib = 'only.there'",
        "trainer.project_name = '${oc.env:ONLY_THERE}'",
        "model.partial_pretrain = '/nodes/model'",
        "data.train_files = '/nodes/data.parquet'",
    ]


def test_what_a_container_on_the_nodes_may_not_see_is_told(login, tmp_path: Path) -> None:
    """Never refused: runtimes bring mounts of the cluster's own."""
    run = (
        "data.chat_template=t.jinja",
        "data.cache_dir=/cache",
        "model.external_lib=yaml",
        "data.val_files=/etc/passwd",
    )
    job = ("slurm.container=pyxis", "image=x.sqsh", f"mounts=[{tmp_path}:/nodes]", "--dry-run")
    done = login(*run, *job)
    assert done.returncode == 0, words(done)
    told = [line for line in done.stdout.splitlines() if line.startswith("only the nodes can tell: ")]
    shown = [line.partition("tell: ")[2] for line in told]
    brought = "it would have to be in the image, or be mounted by the cluster or by options of yours"
    assert shown[1:] == [
        "command line: data.chat_template = 't.jinja': is no absolute path: in the container it may begin at another "
        "folder (fix: data.chat_template=/absolute/path/to/t.jinja, and mounts: [/absolute/path/to] unless that folder "
        "is seen already)",
        "command line: data.cache_dir = '/cache': is not mounted for the job to write there (fix: add it: mounts: "
        "[/cache:rw])",
        "sft.yaml:1: data.train_files = '/nodes/data.parquet': there is no such file or folder on this machine (fix: "
        "correct the path, unless the job finds it there)",
        f"command line: data.val_files = '/etc/passwd': is seen by no mount of the container: {brought} (fix: add it: "
        "mounts: [/etc/passwd])",
        "command line: model.external_lib = 'yaml': would have to be installed in the image, or lie in a mounted "
        "folder of PYTHONPATH (fix: install it in the image)",
    ]
    # Without a container the job sees what its nodes have.
    shown = login("data.val_files=/etc/passwd", "data.cache_dir=/cache", "--dry-run").stdout
    assert "/etc/passwd" not in shown.partition("# sbatch")[0]
    assert "data.cache_dir = " not in shown


def test_a_config_that_is_edited_later_does_not_change_a_job_that_waits(login, tmp_path: Path) -> None:
    login()
    (tmp_path / "sft.yaml").write_text(f"{CONFIG}trainer: {{seed: 7}}\n")
    (copy,) = (tmp_path / "runs" / "slurm" / "configs").rglob("sft.yaml")
    assert copy.read_text() == CONFIG
    assert copy.stat().st_mode & 0o777 == 0o600
    assert str(copy).encode() in (tmp_path / "runs" / "slurm" / "77_submitted.pkl").read_bytes()
    done = login("slurm.container=apptainer", "image=x.sif", "slurm.folder=elsewhere", "--dry-run")
    assert f"--bind={tmp_path}:{tmp_path}:ro" in done.stdout  # what else lies beside it
    assert f"--bind={tmp_path}/elsewhere/configs/" in done.stdout
    login()
    assert len([*(tmp_path / "runs" / "slurm" / "configs").rglob("sft.yaml")]) == 2


def test_a_folder_that_was_there_is_the_owner_s_alone_too(login, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir(mode=0o755)
    assert login("slurm.folder=logs").returncode == 0
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


def test_a_job_file_that_is_not_there(login, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").unlink()
    said = words(login())
    assert "cannot be read: No such file or directory\n    fix: correct the path" in said


def test_no_sbatch(login) -> None:
    done = login(sbatch=None, PATH="/nowhere")
    assert (done.returncode, words(done).splitlines()[0]) == (2, "sbatch is not on PATH")


def test_sbatch_says_no(login) -> None:
    done = login(sbatch="echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    assert done.returncode == 2
    assert "invalid partition specified: nope" in words(done)
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_made(login, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    done = login()
    assert done.returncode == 73
    assert "fix: another checkpoint_dir or slurm.folder" in words(done)


def test_what_the_shell_says_to_sbatch_does_not_reach_it(login, tmp_path: Path) -> None:
    """Slurm takes SBATCH_* before the script; the job's own variables, and where Slurm is, go on."""
    shell = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_EXPORT": "NONE",
        "SLURM_TIME_FORMAT": "relative",
        # Of an array's task that submits.
        "SLURM_JOB_ID": "5",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_CPU_BIND": "none",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURMD_NODENAME": "n1",
        "SRUN_CPUS_PER_TASK": "2",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    kept = {"SLURM_CONF": "/etc/s", "SLURM_CLUSTERS": "main", "SLURM_JWT": "x"}
    sbatch = f"env > {tmp_path}/seen; echo Submitted batch job 77"
    done = login(sbatch=sbatch, **kept, **shell)
    assert done.returncode == 0, words(done)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert not shell.keys() & seen.keys()
    assert {**kept, "WANDB_API_KEY": CANARY}.items() <= seen.items()
    assert done.stdout.splitlines()[len(NOT_HERE)].endswith(f": {', '.join(sorted(shell))}")


@pytest.mark.parametrize(("ends", "code"), [("0_0", 0), ("0_65", 65)])
def test_a_preflight_is_waited_for(login, tmp_path: Path, ends: str, code: int) -> None:
    runs = tmp_path / "runs" / "slurm"
    job = f"mkdir -p {runs}/77_ends/0; echo 'a table' > {runs}/77_0_log.out; touch {runs}/77_ends/0/{ends}"
    done = login("--preflight", sbatch=f"{job}; echo Submitted batch job 77")
    assert (done.returncode, "a table" in done.stdout) == (code, True)
    assert "it waits in the queue as any other job; Ctrl-C cancels it\n" in done.stdout
    assert "run folder" not in done.stdout


@pytest.fixture
def preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A preflight job that was submitted, and a squeue whose answers are lines of shell, the last one for ever."""
    plan = Plan(folder=str(tmp_path), config="c", checkpoint_dir=str(tmp_path), python="python")
    asked = tmp_path / "asked"
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(room, "_GONE_SECONDS", 0.05)
    monkeypatch.setattr(room, "_LAST_WORD_SECONDS", 0.3)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def wait(*answers: str) -> tuple[int, int, list[str]]:
        shown: list[str] = []
        cases = "".join(f"{at}) {answer};; " for at, answer in enumerate(answers[:-1], 1))
        text = f"echo x >> {asked}; case $(wc -l < {asked}) in {cases}*) {answers[-1]};; esac"
        (tmp_path / "squeue").write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "squeue").chmod(0o755)
        try:
            code = room.wait_for_preflight(plan, "77", 1, shown.append)
        except JobError as error:
            code = int(error.code)
        return code, len(asked.read_text().split()), shown

    return wait


def test_a_preflight_is_waited_for_through_errors_of_squeue(preflight, tmp_path: Path) -> None:
    """One that says nothing of the job, and an answer without it that is not true a moment later."""
    ends = f"mkdir -p {tmp_path}/77_ends/0; touch {tmp_path}/77_ends/0/0_65"
    wrong = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    assert (
        preflight(*[wrong] * 40, "true", "sleep 0.1; echo 77", "sleep 0.1; echo 77", "true", f"{ends}; echo 77")[0]
        == 65
    )


@pytest.mark.parametrize("after", ["echo 77", "true"])
def test_the_last_word_of_a_preflight_is_shown_though_its_nodes_have_ended(
    preflight, tmp_path: Path, after: str
) -> None:
    ends = f"mkdir -p {tmp_path}/77_ends/0; touch {tmp_path}/77_ends/0/0_66"
    code, _, shown = preflight(f"{ends}; echo 77", f"echo 'preflight failed' > {tmp_path}/77_0_log.out; {after}")
    assert (code, shown) == (66, ["preflight failed"])


@pytest.mark.parametrize("said", ["true", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"])
def test_a_preflight_that_ended_without_a_word(preflight, said: str) -> None:
    code, asked, _ = preflight("echo 77", said)
    assert code == 137
    assert asked > 2


def test_ctrl_c_leaves_no_preflight_in_the_queue(login, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    for name, text in (("squeue", "kill -INT $PPID; echo 77"), ("scancel", f"echo $@ > {tmp_path}/cancelled")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    done = login("--preflight")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (143, "job 77 is cancelled")
    assert (tmp_path / "cancelled").read_text() == "77\n"
