"""Variables that make ranks faster: added where the user has none of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.topology import Topology
from sft_job.contract import RunFolder
from sft_job.ranks import RankGroup
from sft_job.tuning import tuned

RUN = RunFolder(Path("/runs/one"))
NAMES = sorted(tuned({}, RUN, 8))
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


@given(st.dictionaries(st.sampled_from([*NAMES, "PATH"]), st.text(max_size=3)), st.integers(0, 400))
def test_what_the_user_has_set_stays(environ: dict[str, str], threads: int) -> None:
    """Also where it is empty, which is a choice too."""
    added = tuned(environ, RUN, threads)
    assert not set(added) & set(environ)
    assert set(added) | set(environ) >= set(NAMES)
    assert 1 <= int(added.get("TORCHINDUCTOR_COMPILE_THREADS", "1")) <= 16


def test_kernels_are_kept_in_the_run_folder() -> None:
    """Each compiler in a folder of its own."""
    folders = [value for name, value in tuned({}, RUN, 8).items() if name.endswith("_DIR")]
    assert len(folders) == len(set(folders)) == 3
    assert {Path(folder).parent for folder in folders} == {RUN.kernels}
    assert RUN.kernels.is_relative_to(RUN.root)


def test_the_allocators_newer_name_counts() -> None:
    assert tuned({}, RUN, 8)[ALLOCATOR] == "expandable_segments:True"
    assert ALLOCATOR not in tuned({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, RUN, 8)


SHOW = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("own", [{}, {ALLOCATOR: "mine", "TRITON_CACHE_DIR": "/elsewhere"}])
def test_ranks_get_them(tmp_path, own) -> None:
    import json

    run = RunFolder(tmp_path / "run")
    run.logs.mkdir(parents=True)
    shown = tmp_path / "environ.json"
    command = [sys.executable, "-c", SHOW, str(shown)]
    group = RankGroup(command, Topology(1, 1, 0, "", None), run, tmp_path, {"LANG": "C", **own})
    try:
        for process in group._processes.values():
            assert process.wait(60) == 0
    finally:
        group.kill()
    found = json.loads(shown.read_text())
    assert found["LANG"] == "C"
    wanted = {**tuned({}, run, 1), **own}
    del wanted["TORCHINDUCTOR_COMPILE_THREADS"]  # of this machine's cores
    assert {name: found[name] for name in wanted} == wanted
