"""The commands that the texts print, from a fresh clone: each with --dry-run in place of an engine."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deploy.docker.settings import DockerSettings
from deploy.docker.submit import submit_job
from sft_job.config.fields import fields_of
from sft_job.contract import Env

ROOT = Path(__file__).parents[4]


def test_printed_commands_are_true(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("deploy", "sft_job"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "demo-run" / "input").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "README.md").read_text().replace("\\\n", " ").replace("$PWD", str(tmp_path)).splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("sft-job submit docker") and "--dry-run" in line]
    assert found
    for words in found:
        overrides = [each for each in words[4:] if each != "--dry-run"]
        shown: list[str] = []
        assert submit_job(Path(words[3]), overrides, {}, shown.append, dry_run=True) == 0
        assert "docker run --name=sft-" in shown[-1]


def test_the_plain_line_says_the_seed_s_variables() -> None:
    block = re.search(r"^docker run .*?[^\\]\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    words = shlex.split(block[0])
    given = {words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "-e"}
    assert given == {Env.CONFIG_PATH, Env.CONFIG_NAME, Env.CHECKPOINT_DIR, Env.NPROC_PER_NODE, "WANDB_API_KEY"}
    values = dict(words[at + 1].split("=") for at, word in enumerate(words) if word == "-e" and "=" in words[at + 1])
    targets = [words[at + 1].split(":")[1] for at, word in enumerate(words) if word == "-v"]
    assert {values[Env.CONFIG_PATH], values[Env.CHECKPOINT_DIR]} <= {*targets}


def test_every_setting_of_the_block_is_told() -> None:
    text = (ROOT / "deploy" / "docker" / "README.md").read_text()
    assert {key for key in fields_of(DockerSettings(), "docker") if f"`{key}`" not in text} == set()
