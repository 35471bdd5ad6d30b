from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_model, write_rows


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with qwen3/, train.parquet (13 rows) and val.parquet (5 rows)."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "qwen3", "qwen3")
    write_rows(folder / "train.parquet", 13)
    write_rows(folder / "val.parquet", 5, seed=1)
    return folder
