"""What the README says is true: its table of settings, its file map, its links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sft_job.config.keys import keys_table
from sft_job.contract import ExitCode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_settings() -> None:
    table = README.partition("<!-- keys -->\n")[2].partition("<!-- /keys -->")[0]
    assert table == keys_table(), "put the output of `sft-job keys` between the marks"


def test_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}


@pytest.mark.parametrize("document", ["README.md", "sft_job/README.md"])
def test_paths_and_links(document) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    here = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    rows = re.findall(r"^\| `([\w./-]+)` \|", text, flags=re.MULTILINE)
    paths = [path for path in rows if "/" in path or "." in path]
    for path in [*links, *(path for path in paths if path not in keys_table())]:
        assert (here / path).exists(), f"{document} names {path}"


def test_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)\b", README)) <= targets | {"graph"}
