"""Every recipe is a config without problems; what it leaves to the user is a path."""

from __future__ import annotations

from pathlib import Path

import pytest

import sft_job
from sft_job.config.load import load_config
from sft_job.config.topology import Topology
from sft_job.config.validate import validate

RECIPES = sorted((Path(sft_job.__file__).parent / "recipes").glob("*.yaml"))


def test_there_is_one_for_long_documents() -> None:
    assert "long-context.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_no_problems(path: Path) -> None:
    loaded = load_config(str(path), [], {})
    assert not loaded.problems, [problem.text() for problem in loaded.problems]
    ranks = max(2, loaded.config.ulysses_sequence_parallel_size)
    problems, warnings = validate(loaded.config, Topology(ranks, 1, 0, "localhost", None), None, loaded.origin)
    assert not problems, [problem.text() for problem in problems]
    assert not warnings


def test_the_longest_document_fits_a_micro_batch() -> None:
    config = load_config(str(RECIPES[[path.name for path in RECIPES].index("long-context.yaml")]), [], {}).config
    assert config.data.max_length <= config.data.max_token_len_per_gpu * config.ulysses_sequence_parallel_size
