"""Whatever a config holds, it is answered with problems on one screen and a code of the contract, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.fuzz import ANSWERS, answer, base_config, bombs, mutant
from tests.chaos.inputs import make_inputs

pytestmark = pytest.mark.slow

ENVIRON = {"NPROC_PER_NODE": "1"}
CONFIGS = 500
BLOCKS = 5
BY_COMMAND = 24
_BOMBS = list(bombs())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    make_inputs(folder)
    return base_config(folder)


def test_the_config_that_is_mutated_is_good(tree) -> None:
    import yaml

    assert answer(yaml.safe_dump(tree).encode(), [], ENVIRON).code == 0


@pytest.mark.parametrize("block", range(BLOCKS))
def test_mutated_configs(tree, block: int) -> None:
    size = CONFIGS // BLOCKS
    answers = {seed: answer(*mutant(tree, seed), ENVIRON) for seed in range(block * size, (block + 1) * size)}
    bad = {seed: got.fault for seed, got in answers.items() if got.fault}
    assert not bad, f"{len(bad)} configs, the first: {next(iter(bad.items()))}"
    assert len({got.code for got in answers.values()}) > 1, "all were answered alike: they are not looked at"


@pytest.mark.parametrize(("name", "content"), _BOMBS, ids=[name for name, _ in _BOMBS])
def test_configs_that_are_made_to_hurt(name: str, content: bytes) -> None:
    got = answer(content, [], ENVIRON)
    assert not got.fault, got.fault
    assert got.code == 2


def test_some_of_them_by_the_real_command(tree, tmp_path: Path) -> None:
    """The same answers from a process of its own, as users start it; nothing is left in the run folder."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "CONFIG_"))}
    environ |= ENVIRON | {"CHECKPOINT_DIR": str(tmp_path / "runs"), "CUDA_VISIBLE_DEVICES": ""}
    cases: dict[str, tuple[bytes, list[str]]] = {name: (content, []) for name, content in _BOMBS[::3]}
    seeds = iter(range(1_000_000))
    while len(cases) < BY_COMMAND:
        seed = next(seeds)
        content, words = mutant(tree, seed)
        if any("\0" in word for word in words) or answer(content, words, ENVIRON).code != 2:
            continue  # no shell can pass it on, or it would train
        cases[f"seed {seed}"] = content, words
    for name, (content, words) in cases.items():
        path = tmp_path / "job.yaml"
        path.write_bytes(content)
        command = [sys.executable, "-m", "sft_job.cli", "train", str(path), *words]
        result = subprocess.run(
            command, env=environ, capture_output=True, timeout=120, check=False, encoding="utf-8", errors="replace"
        )
        assert result.returncode in ANSWERS - {0}, f"{name}: {result.returncode}\n{result.stderr[-2000:]}"
        assert "Traceback" not in result.stderr + result.stdout, f"{name}: {result.stderr[-3000:]}"
        assert result.stderr.strip(), f"{name}: not a word"
    assert not (tmp_path / "runs").exists()
