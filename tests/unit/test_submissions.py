from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.contract import RunFolder
from sft_job.errors import ProblemsError
from sft_job.submissions import (
    Requeue,
    find,
    note_judgement,
    note_requeue,
    read_judgement,
    read_requeue,
    record,
    remember,
    state_folder,
)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home")}


def test_a_job_is_found_by_its_id_with_and_without_its_launcher(environ, tmp_path) -> None:
    path = record("slurm", "12_3", tmp_path / "sft", environ=environ, logs=["/logs/12_3_*.err"], ask="squeue -j 12_3")
    assert path == tmp_path / "home" / ".local/state/sft_job/jobs/slurm-12_3.json"
    for text in ("12_3", "slurm:12_3"):
        found = find(text, environ)
        assert (found.launcher, found.job, found.run) == ("slurm", "12_3", str(tmp_path / "sft"))
        assert found.logs == ("/logs/12_3_*.err",)
        assert found.ask == "squeue -j 12_3"


def test_who_submits_says_how_people_ask_for_it(environ) -> None:
    run = Path("/runs/sft")
    assert remember("slurm", "7", run, environ=environ) == ["run folder: /runs/sft", "how it stands: sft-job status 7"]
    assert find("7", environ).run == "/runs/sft"
    away = remember("kubernetes", "a.job.b", run, environ=environ, ask="kubectl exec b", place="the claim c")
    assert away == [
        "run folder: /runs/sft on the claim c",
        "how it stands: kubectl exec b",
        "what is known of it here: sft-job status a.job.b",
    ]
    assert find("a.job.b", environ).place == "the claim c"


def test_a_job_that_cannot_be_recorded_is_submitted_all_the_same() -> None:
    run, lost = Path("/runs/sft"), "HOME = ''\n    must be an absolute path"
    folder, how = remember("slurm", "7", run, environ={})
    assert folder == "run folder: /runs/sft"
    assert how.startswith("how it stands: sft-job status /runs/sft (not by the job's id: ")
    assert lost in how
    *_, known = remember("kubernetes", "a.job.b", run, environ={}, ask="kubectl exec b", place="the claim c")
    assert known.startswith("(sft-job status a.job.b does not know it: ")
    assert lost in known


def test_a_run_folder_may_lie_where_this_machine_does_not_see_it(environ) -> None:
    path = record("kubernetes", "mine", Path("/runs/sft"), environ=environ, place="the claim runs")
    assert find("mine", environ).place == "the claim runs"
    older = json.loads(path.read_text())
    del older["place"]
    path.write_text(json.dumps(older))
    assert find("mine", environ).place == ""
    with pytest.raises(ValueError, match="a control character"):
        record("kubernetes", "mine", Path("/runs/sft"), environ=environ, place="the\x1b[2Jclaim")


def test_a_record_is_replaced_and_leaves_nothing_else(environ, tmp_path) -> None:
    for name in ("one", "two"):
        record("slurm", "7", tmp_path / name, environ=environ)
    assert find("7", environ).run == str(tmp_path / "two")
    assert [path.name for path in state_folder(environ).iterdir()] == ["slurm-7.json"]


def test_the_state_folder_follows_the_desktop_standard(environ, tmp_path) -> None:
    assert state_folder({**environ, "XDG_STATE_HOME": "/state"}) == Path("/state/sft_job/jobs")
    assert state_folder({**environ, "XDG_STATE_HOME": "relative"}) == state_folder(environ)
    with pytest.raises(ProblemsError, match="HOME"):
        state_folder({})


def test_an_id_that_two_launchers_have_asks_for_the_launcher(environ, tmp_path) -> None:
    record("slurm", "7", tmp_path / "a", environ=environ)
    record("kubernetes", "7", tmp_path / "b", environ=environ)
    with pytest.raises(ProblemsError, match="kubernetes:7, slurm:7"):
        find("7", environ)
    assert find("kubernetes:7", environ).run == str(tmp_path / "b")


@pytest.mark.parametrize("text", ["8", "slurm:8", "", "../x", "*", "slurm:*", "a b", "7\n", "-7"])
def test_what_is_no_known_job_says_where_it_looked(environ, tmp_path, text: str) -> None:
    record("slurm", "7", tmp_path / "a", environ=environ)
    record("slurm", "x-8", tmp_path / "a", environ=environ)
    with pytest.raises(ProblemsError, match=r"neither a folder nor a job .*sft_job/jobs"):
        find(text, environ)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"launcher": "slurm"}', '{"logs": 3}', "\x00"])
def test_a_damaged_record_is_none(environ, tmp_path, content: str) -> None:
    record("slurm", "7", tmp_path / "a", environ=environ).write_text(content)
    with pytest.raises(ProblemsError):
        find("7", environ)


@given(st.text(max_size=8), st.text(max_size=8))
def test_odd_names_never_become_files_elsewhere(tmp_path_factory, launcher: str, job: str) -> None:
    home = tmp_path_factory.mktemp("home")
    environ = {"HOME": str(home)}
    try:
        path = record(launcher, job, home, environ=environ)
    except ValueError:
        return
    assert path.parent == state_folder(environ)
    assert path.resolve() == path
    assert find(f"{launcher}:{job}", environ).job == job


def test_control_characters_and_a_folder_that_cannot_be_written_are_refused(environ, tmp_path) -> None:
    with pytest.raises(ValueError, match="control character"):
        record("slurm", "7", tmp_path, environ=environ, ask="squeue\n-j 7")
    (tmp_path / "home").write_text("")
    with pytest.raises(ProblemsError) as caught:
        record("slurm", "7", tmp_path, environ=environ)
    assert caught.value.code == 73


def test_a_requeue_counts_until_the_outcome_changes(tmp_path) -> None:
    run = RunFolder(tmp_path)
    note_requeue(run, "slurm", "7")  # no run folder: nothing to say, nothing raised
    assert read_requeue(run) is None
    run.logs.mkdir()
    run.outcome.write_text(json.dumps({"reason": "stopped"}))
    note_requeue(run, "slurm", "7")
    found = read_requeue(run)
    assert isinstance(found, Requeue)
    assert (found.launcher, found.job) == ("slurm", "7")
    run.outcome.write_text(json.dumps({"reason": "running"}))
    assert read_requeue(run) is None
    (run.logs / "requeued.json").write_text("[]")
    assert read_requeue(run) is None


def test_what_is_said_late_of_an_earlier_start_is_not_kept(tmp_path) -> None:
    run = RunFolder(tmp_path)
    note_judgement(run, "slurm", "7", 0, "x", {})  # no run folder: nothing to say, nothing raised
    assert read_judgement(run) is None
    run.logs.mkdir()
    for job, start, kept in (("7", 1, "7-1"), ("7", 0, "7-1"), ("7", 2, "7-2"), ("8", 0, "8-0")):
        note_judgement(run, "slurm", job, start, f"{job}-{start}", {"loss": start})
        found = read_judgement(run)
        assert found is not None
        assert found.why == kept
    run.launched.write_text('{"counts": 3}')
    assert read_judgement(run) is None


def test_it_loads_neither_torch_nor_the_settings() -> None:
    code = "import sys, sft_job.submissions; print(sorted({'torch', 'omegaconf', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
