"""What the image is built from: locked packages, those of the project; the Dockerfile and the scripts beside it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[4]
DIGEST = "sha256:" + "0123456789abcdef" * 4
OTHER = "sha256:" + "0" * 64
LOCKS = ("image", "fa4", "fa2", "fa2-build")


def locked(name: str) -> dict[str, str]:
    """Package -> version of a lock file."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    found = re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_hashes(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    packages = [at for at, line in enumerate(lines) if line and not line.startswith((" ", "#"))]
    assert packages
    for at in packages:
        assert re.fullmatch(r"[a-z0-9-]+==\S+( ; .+)? \\", lines[at])
        assert re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", lines[at + 1])


def test_the_project_s_packages_are_locked_but_for_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["wandb"], *extras["tensorboard"], *extras["fp8"]]
    found = locked("image")
    for requirement in map(Requirement, wanted):
        if requirement.name != "torch":
            assert requirement.specifier.contains(found[requirement.name], prereleases=True), requirement
    for requirement in map(Requirement, extras["fa4"]):
        assert requirement.specifier.contains(locked("fa4")[requirement.name], prereleases=True), requirement
    for name in LOCKS:
        assert not {"torch", "triton", "nvidia-cublas", "nvidia-nccl-cu13"} & set(locked(name))


def test_the_image_has_the_versions_that_are_tested() -> None:
    pairs = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {canonicalize_name(name): version for name, version in pairs}
    for lock in LOCKS:
        for name, version in locked(lock).items():
            assert pinned.get(name, version) == version, f"{lock}.txt: {name}; fix: make lock"
            assert locked("image").get(name, version) == version, f"{lock}.txt: {name}; fix: make lock"


def test_the_dockerfile_s_base_fits() -> None:
    text = (ROOT / "Dockerfile").read_text()
    torch = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch
    for name in ("BASE_IMAGE", "DEVEL_IMAGE"):
        assert re.search(rf"^ARG {name}=pytorch/pytorch:{torch[1]}-cuda\S+$", text, re.MULTILINE)
    # What engines of three years ago, and those without a registry at hand, do not take.
    assert not re.search(r"^# *syntax=|<<|--link|HEALTHCHECK", text, re.MULTILINE)
    assert "**/__pycache__" in (ROOT / ".dockerignore").read_text()


ENGINE = """#!/bin/bash
echo "$*" >> {log}
case "$1" in image) echo; echo other@{other}; echo pytorch/pytorch@{digest}; echo localhost/no@sha256:short ;; esac
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "docker"
    path.write_text(ENGINE.format(log=tmp_path / "asked", digest=DIGEST, other=OTHER))
    path.chmod(0o755)
    return path


def run(script: str, tmp_path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(
        [str(ROOT / "scripts" / script), *words],
        env={**os.environ, "PATH": path, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_digest_is_written_behind_the_tag_and_moves_on(engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    before = (ROOT / "Dockerfile").read_text()
    file.write_text(before)
    assert run("base-digest", tmp_path, str(file)).returncode == 0
    assert "devel" not in (tmp_path / "asked").read_text()
    assert file.read_text().count(f"@{DIGEST}\n") == 1
    assert run("base-digest", tmp_path, str(file), FLASH_ATTENTION="fa2").returncode == 0
    once = file.read_text()
    assert once.count(f"@{DIGEST}\n") == 2
    assert once.replace(f"@{DIGEST}", "") == before
    other = DIGEST[:-2] + "00"
    engine.write_text(engine.read_text().replace(DIGEST, other))
    assert run("base-digest", tmp_path, str(file), FLASH_ATTENTION="fa2").returncode == 0
    assert file.read_text() == once.replace(DIGEST, other)
    asked = (tmp_path / "asked").read_text()
    assert "pull --quiet pytorch/pytorch:" in asked
    assert "pull --quiet pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime@" not in asked


def test_an_image_without_a_digest_changes_nothing(engine: Path, tmp_path: Path) -> None:
    engine.write_text("#!/bin/bash\n")
    file = tmp_path / "Dockerfile"
    file.write_text((ROOT / "Dockerfile").read_text())
    done = run("base-digest", tmp_path, str(file))
    assert done.returncode == 2
    assert "comes from no registry" in done.stderr
    assert file.read_text() == (ROOT / "Dockerfile").read_text()


def test_the_build_s_command(engine: Path, tmp_path: Path) -> None:
    more = {
        "BASE_IMAGE": "mine:1",
        "TORCH": "2.13.0+cpu",
        "PIP_CONF": "/x/pip.conf",
        "NETWORK": "host",
        "IMAGE": "me:2",
    }
    assert run("image", tmp_path, "--quiet", **more).returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("build --build-arg VERSION=")
    for word in (
        "--build-arg BASE_IMAGE=mine:1",
        "--build-arg TORCH=2.13.0+cpu",
        "--secret id=pip_conf,src=/x/pip.conf",
        "--network host",
        "--tag me:2 --quiet .",
    ):
        assert word in asked
    assert "FLASH_ATTENTION" not in asked


def test_what_is_not_committed_is_told(tmp_path: Path) -> None:
    """Also a file that git does not know: the build takes it along."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "sft_job").mkdir()
    (tmp_path / "scripts" / "image").write_bytes((ROOT / "scripts" / "image").read_bytes())
    (tmp_path / "sft_job" / "__init__.py").write_text('__version__ = "1.2.3"\n')

    def line() -> str:
        command = ["bash", str(tmp_path / "scripts" / "image")]
        environ = {**os.environ, "ENGINE": "echo", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert "does not say its commit" in line()
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert re.search(r"REVISION=[0-9a-f]{40} ", line())
    (tmp_path / "notes.txt").write_text("no part of the image")
    assert "-dirty" not in line()
    (tmp_path / "sft_job" / "new.py").write_text("")
    assert re.search(r"REVISION=[0-9a-f]{40}-dirty ", line())
