from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.contract import ExitCode
from sft_job.errors import ProblemsError
from sft_job.jobfile.load import LoadedJob, load_job
from sft_job.jobfile.validate import seconds_of

LEAST = "config: sft.yaml\ncheckpoint_dir: /runs/one\n"


@dataclass
class Block:
    """A launcher's settings."""

    queue: str | None = None
    """A queue."""
    more: dict[str, str] = field(default_factory=dict[str, str])
    """Options."""


def load(tmp_path: Path, text: str, *overrides: str) -> LoadedJob[Block]:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides, "slurm", Block, lambda job, block: [])


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ProblemsError) as raised:
        load(tmp_path, text, *overrides)
    assert raised.value.code == ExitCode.CONFIG
    return str(raised.value)


def test_defaults(tmp_path: Path) -> None:
    job = load(tmp_path, LEAST).job
    assert (job.name, job.resources.nodes, job.retries.timeouts, job.ranks_per_node) == ("sft", 1, None, 1)


def test_file_and_command_line(tmp_path: Path) -> None:
    text = f"{LEAST}resources: {{nodes: 2, gpus_per_node: 8}}\nslurm: {{queue: fast}}\nenvironment: {{A: 1}}\n"
    loaded = load(tmp_path, text, "resources.nodes=4", "environment.B=x=y", "optim.lr=1e-5", "slurm.more.nice=7")
    assert (loaded.job.resources.nodes, loaded.job.ranks_per_node, loaded.block.queue) == (4, 8, "fast")
    assert loaded.job.environment == {"A": "1", "B": "x=y"}
    assert loaded.job.overrides == ["optim.lr=1e-5"]
    assert loaded.block.more == {"nice": "7"}
    assert loaded.origin("resources.nodes") == "command line"
    assert loaded.origin("slurm.queue") == "job.yaml:4"


@pytest.mark.parametrize(
    ("written", "time"),
    [("12:00:00", "12:00:00"), ("90", "90"), ("1-00:00:00", "1-00:00:00"), ('"0:30:00"', "0:30:00")],
)
def test_texts_are_what_is_written(tmp_path: Path, written: str, time: str) -> None:
    """YAML 1.1 would make a number to base 60 of a time."""
    job = load(tmp_path, f"{LEAST}name: 010\nresources: {{time: {written}}}\n").job
    assert (job.name, job.resources.time) == ("010", time)


def test_variables_and_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ME", "ada")
    job = load(tmp_path, "config: a.yaml\nname: graph\ncheckpoint_dir: /scratch/${oc.env:ME}/${name}\n").job
    assert job.checkpoint_dir == "/scratch/ada/graph"
    assert "MISSING_ONE" in problems(tmp_path, "config: a.yaml\ncheckpoint_dir: /s/${oc.env:MISSING_ONE}\n")


def test_what_is_the_shell_s_own(tmp_path: Path) -> None:
    said = problems(tmp_path, f"{LEAST}environment: {{A: '${{HOMER}}/x'}}\n")
    assert "for the shell to fill in: \\${NAME}" in said
    assert load(tmp_path, f"{LEAST}environment: {{A: '\\${{HOMER}}/x'}}\n").job.environment == {"A": "${HOMER}/x"}


def test_the_name_of_an_option_that_is_no_text(tmp_path: Path) -> None:
    said = problems(tmp_path, f"{LEAST}slurm:\n  more: {{nice: 1, mail-type: [END, FAIL]}}\n")
    assert "job.yaml:4: slurm.more.mail-type\n    must be a text\n    fix: write one text, in quotes" in said


def test_other_launchers_blocks_are_theirs(tmp_path: Path) -> None:
    assert load(tmp_path, f"{LEAST}kubernetes: {{namespace: ml}}\ndocker: {{odd: [1]}}\n").block.queue is None


def test_everything_at_once_with_lines_and_legal_names(tmp_path: Path) -> None:
    text = (
        "config: sft.yaml\nname: a b\nresorces: {nodes: 2}\nresources:\n  nodes: two\n  gpus: 8\n"
        "overrides: optim.lr=1\nslurm:\n  que: x\n  que: y\nmounts: [relative]\n"
    )
    said = problems(tmp_path, text)
    assert said.startswith("10 problems:")
    for part in (
        "job.yaml:2: name = 'a b'",
        "job.yaml:3: resorces\n    unknown key\n    fix: did you mean resources? at the top level there are: ch",
        "job.yaml:5: resources.nodes = 'two'\n    must be a whole number",
        "job.yaml:6: resources.gpus\n    unknown key\n    fix: did you mean resources.gpus_per_node? below resources",
        "job.yaml:7: overrides = 'optim.lr=1'\n    must be a list of texts\n    fix: write [optim.lr=1]",
        "job.yaml:9: slurm.que\n    unknown key\n    fix: did you mean slurm.queue? below slurm there are: more, queue",
        "job.yaml:10: slurm.que\n    duplicate key",
        "job.yaml:11: mounts[0] = 'relative'",
        "checkpoint_dir\n    must name a folder that every node sees",
    ):
        assert part in said


def test_a_misspelt_section_on_the_command_line(tmp_path: Path) -> None:
    for written, meant in (("slrum.queue=x", "slurm.queue"), ("resorces.nodes=2", "resources.nodes")):
        with pytest.raises(ProblemsError) as caught:
            load(tmp_path, LEAST, written)
        assert f"did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: [", "\ta: b", "config: !!python/object:os.system x\n", "x: &a [*a]\n", "config: {a: b}\n"]
)
def test_what_is_no_job_file(tmp_path: Path, text: str) -> None:
    assert "job.yaml" in problems(tmp_path, text)


@pytest.mark.parametrize("override", ["nodes", "=1", "resources.nodes=", "resources=3", "environment=[", "nme=x"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert "command line" in problems(tmp_path, LEAST, override)


ODD = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@settings(max_examples=30)
@given(key=ODD, value=ODD)
def test_any_override_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, key: str, value: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(LEAST)
    for each in (f"{key}={value}", f"name={value}", f"environment.{key}={value}"):
        try:
            load_job(path, [each], "slurm", Block, lambda job, block: [])
        except ProblemsError as error:
            assert error.code == ExitCode.CONFIG  # noqa: PT017


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-1:30", 91800), ("1-0:0:1", 86401),
        ("", None), ("x", None), ("1:2:3:4", None), ("-1", None), ("1-", None), ("٣", None),
    ],
)  # fmt: skip
def test_times(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds
