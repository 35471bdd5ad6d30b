"""The commands that the texts print, from a fresh clone: each with --dry-run in place of a cluster."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes.render import KINDS
from deploy.kubernetes.settings import KubernetesSettings
from deploy.kubernetes.submit import submit_job

ROOT = Path(__file__).parents[4]
TEXTS = ("README.md", "deploy/kubernetes/README.md", "deploy/manifests/job.yaml")


def commands(text: str, beginning: str) -> list[list[str]]:
    lines = ((ROOT / text).read_text()).splitlines()
    plain = (line.removeprefix("#").strip() for line in lines)
    return [shlex.split(line, comments=True) for line in plain if line.startswith(beginning)]


@pytest.mark.parametrize("text", TEXTS)
def test_printed_commands_are_true(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(text, "sft-job submit kubernetes deploy/")
    assert found
    for words in found:
        kind = words[words.index("--kind") + 1] if "--kind" in words else None
        overrides = [each for each in words[4:] if "=" in each]
        assert {each for each in words if each.startswith("--")} <= {"--kind", "--dry-run"}
        shown: list[str] = []
        assert submit_job(Path(words[3]), overrides, {}, shown.append, kind=kind, dry_run=True) == 0
        documents = list(yaml.safe_load_all(shown[-1]))
        assert documents[-1]["kind"].lower() == (kind or "pytorchjob")


def test_printed_files_are_there() -> None:
    for text in TEXTS[:2]:
        for words in commands(text, "kubectl apply") + commands(text, "kubectl delete"):
            (path,) = [each for each in words if each.startswith("deploy/")]
            assert (ROOT / path).exists(), words
            assert (ROOT / path / "kustomization.yaml").exists() == ("-k" in words)


def test_every_setting_and_kind_is_told() -> None:
    text = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
    settings = text.partition("## Settings")[2]
    for each in fields(KubernetesSettings):
        assert f"`{each.name}`" in settings.replace("kubernetes.kind", "kind"), each.name
    for kind in KINDS:
        assert f"| `{kind}` |" in text
