"""The commands that the texts print, from a fresh clone: each with --dry-run in place of a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from slurm.submit import submit_job

ROOT = Path(__file__).parents[3]
TEXTS = ("README.md", "slurm/README.md", *(f"slurm/profiles/{name}.yaml" for name in ("apptainer", "bare", "pyxis")))


def commands(text: str) -> list[list[str]]:
    lines = (line.removeprefix("#").strip() for line in (ROOT / text).read_text().splitlines())
    found = [
        shlex.split(line, comments=True) for line in lines if "sft-job submit slurm slurm/" in line and "`" not in line
    ]
    return [words for words in found if words]


@pytest.mark.parametrize("text", TEXTS)
def test_printed_commands_are_true(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(text)
    assert found
    for words in found:
        at = words.index("sft-job")
        environ = dict(each.split("=", 1) for each in words[:at])
        assert words[at : at + 3] == ["sft-job", "submit", "slurm"]
        options = [each for each in words[at + 4 :] if each.startswith("--")]
        assert {*options} <= {"--dry-run", "--preflight"}
        overrides = [each for each in words[at + 4 :] if not each.startswith("--")]
        shown: list[str] = []
        preflight = "--preflight" in options
        path = Path(words[at + 3])
        assert submit_job(path, overrides, environ, shown.append, dry_run=True, preflight=preflight) == 0
        assert "#!/bin/bash" in shown[-1]
