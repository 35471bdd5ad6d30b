"""The real command with an engine that writes down what it got."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_job.submissions import find

CANARY = "c0ffee" * 6
ENGINE = """#!{python}
import json, os, sys
if sys.argv[1] == "image":  # not there where somebody says so
    sys.exit(os.path.exists("not_pulled"))
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ.get("WANDB_API_KEY", "")]) + "\\n")
if sys.argv[1] == "run" and {verb!r} in sys.argv:
    sys.stderr.write({said!r})
    sys.exit({code})
"""


@pytest.fixture
def box(tmp_path: Path):
    """A machine: a folder with job and config, and an engine on PATH."""
    tools, log = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    settings = {"data": {"train_files": f"{tmp_path}/a.parquet"}, "model": {"partial_pretrain": f"{tmp_path}/model"}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    job = {"config": "sft.yaml", "checkpoint_dir": "runs", "image": "x:1", "secrets": ["WANDB_API_KEY"], "name": "mine"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def run(*arguments: str, engine: str | None = "docker", verb: str = "train", said: str = "", code: int = 0):
        if engine is not None:
            text = ENGINE.format(python=sys.executable, log=str(log), said=said, code=code, verb=verb)
            (tools / engine).write_text(text)
            (tools / engine).chmod(0o755)
        environ = {"PATH": str(tools), "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "sft_job.cli", "submit", "docker", "job.yaml", *arguments],
            cwd=tmp_path,
            env={**environ, "WANDB_API_KEY": CANARY},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def asked(folder: Path) -> list[list[str]]:
    """What the engine was asked, each time."""
    path = folder / "asked"
    return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error without the imports."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_started_and_shown(box, tmp_path: Path) -> None:
    done = box("optim.lr=3e-5")
    assert done.returncode == 0, words(done)
    ((run, *rest),) = asked(tmp_path)
    assert run == "run"
    name = rest[0].removeprefix("--name=")
    assert name.startswith("mine-")
    assert done.stdout.splitlines() == [
        f"only the container can tell: sft.yaml:4: model.partial_pretrain = '{tmp_path}/model': there is no such "
        "folder (fix: correct the path, or mount the folder into the container)",
        f"only the container can tell: sft.yaml:2: data.train_files = '{tmp_path}/a.parquet': there is no such file or "
        "folder on this machine (fix: correct the path, unless the job finds it there)",
        f"started container {name}: 1 rank(s)",
        f"log: docker logs --follow {name}",
        f"run folder: {tmp_path}/runs/sft",
        f"how it stands: sft-job status {name}",
        f"stop it: docker stop {name} (it saves first; submit it again and it goes on)",
        f"exit code: docker wait {name}; forget it: docker rm --volumes {name}",
    ]
    verb, config, override = rest[-3:]
    assert (verb, override) == ("train", "optim.lr=3e-5")
    assert Path(config).read_text() == (tmp_path / "sft.yaml").read_text()
    assert f"--user={os.getuid()}:{os.getgid()}" in rest
    assert f"--volume={tmp_path}/runs:{tmp_path}/runs:rw" in rest
    known = find(name, {"HOME": str(tmp_path)})
    assert (known.launcher, known.run) == ("docker", f"{tmp_path}/runs/sft")


def test_the_secret_reaches_the_engine_and_nothing_else(box, tmp_path: Path) -> None:
    done = box()
    ((_, value),) = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert value == CANARY
    assert CANARY not in done.stdout + done.stderr + str(asked(tmp_path))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "asked"]
    assert written
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def test_submitting_imports_no_torch(box) -> None:
    imported = {line.rpartition("|")[2].strip() for line in box().stderr.splitlines() if "import time:" in line}
    assert "deploy.docker.submit" in imported
    assert not {"torch", "transformers", "submitit"} & imported


def test_a_dry_run_starts_and_writes_nothing(box, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = box("--dry-run", engine=None)
    assert done.returncode == 0, words(done)
    assert sorted(tmp_path.rglob("*")) == before
    line = next(each for each in done.stdout.splitlines() if each.startswith("docker run "))
    assert "--detach" in shlex.split(line)
    assert "WANDB_API_KEY: from the environment in which you submit" in done.stdout


def test_everything_that_is_wrong_at_once(box, tmp_path: Path) -> None:
    done = box("config=no.yaml", "mounts=[/not/there]", "secrets=[NOT_SET]", "checkpoint_dir=/a,b")
    assert done.returncode == 2
    said = words(done)
    assert said.startswith("4 problems:")
    assert "config = 'no.yaml'\n    there is no such file" in said
    assert "mounts[0] = '/not/there'\n    there is no such file or folder on this machine" in said
    assert "secrets[0] = 'NOT_SET'" in said
    assert "is mounted into the container: must be plain absolute paths" in said
    assert not asked(tmp_path)
    done = box("optim.lrr=1", "optim.lr=-1")
    assert done.returncode == 2
    assert "did you mean optim.lr?" in words(done)


def test_an_image_that_is_pulled_first_is_told(box, tmp_path: Path) -> None:
    line = "x:1 is not on this machine: docker pulls it first; a large image takes minutes"
    assert line not in box().stdout
    (tmp_path / "not_pulled").touch()
    assert line in box().stdout


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("checkpoint_dir=/", "mounted at / it would hide"),
        ("checkpoint_dir=/tmp", "mounted at /tmp it would hide"),
        ("checkpoint_dir=/opt/sft-job/x", "mounted at /opt/sft-job/x it would hide"),
        ("mounts=[/:/usr/local]", "mounted at /usr/local it would hide"),
        ("data.train_files=rows/a.parquet", "is no absolute path"),
        (
            "data.val_files=[/etc/passwd]",
            "is seen by no mount of the container\n    fix: add it: mounts: [/etc/passwd]",
        ),
        ("data.chat_template=/usr/bin/env", "fix: add it: mounts: [/usr/bin/env]"),
        ("data.custom_cls.path=mine.py", "data.custom_cls.path=/absolute/path/to/mine.py, and mounts: "),
        ("model.partial_pretrain=/usr", "fix: add it: mounts: [/usr]"),
        ("model.external_lib=my-lib", "must be the name of a Python module"),
        ("trainer.default_hdfs_dir=/data/copy", "fix: add it: mounts: [/data/copy:rw]"),
        ("data.cache_dir=/data/cache", "fix: add it: mounts: [/data/cache:rw]"),
    ],
)
def test_what_the_container_could_not_do_with(box, tmp_path: Path, override: str, told: str) -> None:
    done = box(override)
    assert done.returncode == 2
    assert told in words(done)
    assert not asked(tmp_path)


def test_what_the_image_may_hold_is_told_and_not_refused(box) -> None:
    words_of_the_run = ("data.val_files=[/in/image/v.parquet]", "data.chat_template=/in/image/t.jinja")
    done = box(*words_of_the_run, "model.partial_pretrain=/in/image/m.1", "model.external_lib=yaml", "--dry-run")
    assert done.returncode == 0, words(done)
    told = [line for line in done.stdout.splitlines() if line.startswith("only the container can tell: command line:")]
    rule = "is seen by no mount of the container: it would have to be in the image (fix: add it: mounts: [/in/image])"
    assert [line.partition("command line: ")[2] for line in told] == [
        f"model.partial_pretrain = '/in/image/m.1': {rule}",
        f"data.chat_template = '/in/image/t.jinja': {rule}",
        f"data.val_files[0] = '/in/image/v.parquet': {rule}",
        "model.external_lib = 'yaml': would have to be installed in the image, or lie in a mounted folder of "
        "PYTHONPATH (fix: install it in the image)",
    ]


@pytest.mark.parametrize("option", ["--tmpfs=/cache", "--mount=type=bind,source=/usr,target=/etc", "--workdir=/data"])
def test_what_options_of_the_user_s_own_may_bring_is_told(box, option: str) -> None:
    run = ("data.cache_dir=/cache", "data.val_files=/etc/passwd", "data.chat_template=t.jinja")
    assert box(*run, "--dry-run").returncode == 2
    done = box(*run, f"docker.args=[{json.dumps(option)}]", "--dry-run")
    assert done.returncode == 0, words(done)
    assert done.stdout.count("only the container can tell: command line: data.") == 3


def test_a_folder_whose_name_no_mount_can_say(box, tmp_path: Path) -> None:
    odd = tmp_path / "a,b"
    odd.mkdir()
    (tmp_path / "sft.yaml").rename(odd / "sft.yaml")
    done = box("config=a,b/sft.yaml")
    assert done.returncode == 2
    assert "is mounted into the container: must be plain absolute paths" in words(done)
    assert "Traceback" not in done.stderr


def test_without_an_engine(box) -> None:
    done = box(engine=None)
    assert done.returncode == 2
    assert words(done) == "docker is not on PATH\n    fix: install it, or set docker.engine=podman"
    assert words(box("docker.engine=podman", engine=None)) == "podman is not on PATH\n    fix: install it"


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ('could not select device driver "" with capabilities: [[gpu]].', "install the NVIDIA container toolkit"),
        ("Cannot connect to the Docker daemon at unix:///x.sock.", "start the engine; `docker info` must work for you"),
        ("Unable to find image 'x:1' locally", "build it here (make image)"),
        ("something else \x1b[2J", "something else  [2J"),
    ],
)
def test_an_engine_that_refuses(box, tmp_path: Path, said: str, fix: str) -> None:
    done = box(said=f"docker: Error: {said}\nSee 'docker run --help'.\n", code=125)
    assert done.returncode == 2
    shown = words(done)
    assert shown.startswith("docker did not start the job:\n    docker: Error: ")
    assert fix in shown
    assert "\x1b" not in shown
    assert "--help" not in shown
    first, second = asked(tmp_path)
    assert second == ["rm", "--force", "--volumes", first[1].removeprefix("--name=")]
    assert not list(tmp_path.glob(".local/state/sft_job/jobs/*"))


def test_a_preflight_comes_first_and_may_be_the_end(box, tmp_path: Path) -> None:
    assert box("preflight=true").returncode == 0
    look, train = asked(tmp_path)
    assert "--rm" in look
    assert "--detach" not in look
    assert look[-2] == "preflight"
    assert train[-2] == "train"
    (tmp_path / "asked").unlink()
    assert box("preflight=true", verb="preflight", code=66).returncode == 66
    assert len(asked(tmp_path)) == 1


def test_folders_that_cannot_be_made(box, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = box(f"checkpoint_dir={tmp_path}/file/runs")
    assert done.returncode == 73
    assert "fix: another checkpoint_dir" in words(done)
    assert not asked(tmp_path)


def test_another_user_can_read_the_copy(box, tmp_path: Path) -> None:
    assert box("docker.user=4242:0").returncode == 0
    ((*_, config),) = asked(tmp_path)
    assert Path(config).stat().st_mode & 0o777 == 0o644
    folders = [each for each in Path(config).parents if each.is_relative_to(tmp_path / "runs" / "docker")]
    assert len(folders) == 3
    assert all(each.stat().st_mode & 0o555 == 0o555 for each in folders)
