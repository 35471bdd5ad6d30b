"""Named data sets in real runs: the mixture at every layout, a loss for each, and a ledger that survives stops."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.checkpoint.state import read_state
from tests.distributed.runs import Watched, run_job, run_jobs, seed_config
from tests.tiny import write_rows

TOTAL = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets in other columns, and a smaller one of each to validate on."""
    folder = tmp_path_factory.mktemp("sets")
    found: dict[str, Path] = {}
    for name, rows, seed in (("math", 9, 1), ("code", 5, 2), ("val_math", 6, 3), ("val_code", 3, 4)):
        found[name] = write_rows(folder / f"{name}.parquet", rows, seed)
        if "code" in name:
            table = pq.read_table(found[name])
            structs = [{"text": text} for text in table["prompt"].to_pylist()]
            pq.write_table(pa.table({"task": structs, "solution": table["response"]}), found[name])
    return found


def columns_of_code(option: str) -> list[str]:
    keys = ("prompt_key=task", "prompt_dict_keys=[text]", "response_key=solution")
    return [f"data.{option}.code.{key}" for key in keys]


def config_of(inputs: Path, files: dict[str, Path], run: Path, *overrides: str):
    return seed_config(
        inputs / "qwen3",
        files["math"],
        files["val_math"],
        run,
        f"data.train_files={{math: {files['math']}, code: {files['code']}}}",
        f"data.val_files={{math: {files['val_math']}, code: {files['val_code']}}}",
        *columns_of_code("train_files"),
        *columns_of_code("val_files"),
        "data.train_files.math.weight=1",
        "data.train_files.code.weight=1",
        "ulysses_sequence_parallel_size=1",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=2",
        "optim.lr=1e-2",
        "trainer.test_freq=after_each_epoch",
        *overrides,
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def ledger(run: Path, folder: str = "final") -> dict[str, Any]:
    return dict(read_state(run / "checkpoints" / folder).sources)


@pytest.fixture(scope="module")
def straight(inputs: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ranks):
    run = tmp_path_factory.mktemp("straight") / "run"
    return ranks(2, run_job, config_of(inputs, files, run))[0], run


def test_one_rank_and_two_see_the_same(inputs, files, tmp_path, ranks, straight) -> None:
    watched, run = straight
    one = ranks(1, run_job, config_of(inputs, files, tmp_path / "one"))[0]
    assert one.rows == watched.rows
    assert one.losses == pytest.approx(watched.losses, rel=1e-12)
    assert ledger(tmp_path / "one") == ledger(run)
    ours, theirs = (
        [{k: v for k, v in line.items() if k.startswith("val/")} for line in lines(of) if "val/loss" in line]
        for of in (tmp_path / "one", run)
    )
    assert [set(line) for line in ours] == [{"val/loss", "val/math/loss", "val/code/loss"}] * 2
    assert ours == [pytest.approx(line, rel=1e-12) for line in theirs]


def test_an_epoch_is_shared_out_by_weight_and_every_row_is_seen(straight) -> None:
    """14 rows, half of an epoch from each set: code (rows 0 to 4) goes round once and again, math rotates."""
    watched: Watched = straight[0]
    assert watched.step == TOTAL
    epochs = [Counter(row for rows in watched.rows[first : first + 4] for row in rows) for first in (0, 4)]
    for counts in epochs:
        assert sum(counts[row] for row in range(5)) == sum(counts[row] for row in range(5, 14)) == 7
        assert {counts[row] for row in range(5)} == {1, 2}
        assert {counts[row] for row in range(5, 14)} == {0, 1}
    assert set(epochs[0] + epochs[1]) == set(range(14))


def test_the_ledger_adds_up(straight) -> None:
    run = straight[1]
    state = read_state(run / "checkpoints" / "final")
    assert {name: source.rows for name, source in state.sources.items()} == {"code": 14, "math": 14}
    assert sum(source.tokens for source in state.sources.values()) == state.tokens
    assert sum(source.supervised_tokens for source in state.sources.values()) == state.supervised_tokens
    steps = [line for line in lines(run) if "train/loss" in line]
    for line in steps:
        assert line["data/code/tokens"] + line["data/math/tokens"] == line["train/tokens"]
        seen = line["data/code/supervised_tokens"] + line["data/math/supervised_tokens"]
        assert seen == line["train/supervised_tokens"]
    assert steps[-1]["data/code/epoch"] == 14 / 5
    assert steps[-1]["data/math/epoch"] == 14 / 9


def test_named_losses_are_those_of_each_set_alone(inputs, files, tmp_path, ranks, straight) -> None:
    whole = [line for line in lines(straight[1]) if "val/loss" in line]
    targets: dict[str, int] = {}
    for name in ("math", "code"):
        run = tmp_path / name
        columns = columns_of_code("val_files") if name == "code" else []
        alone = [f"data.val_files={{{name}: {files[f'val_{name}']}}}", *columns]
        ranks(2, run_job, config_of(inputs, files, run, *alone))
        found = [line for line in lines(run) if "val/loss" in line]
        assert [line[f"val/{name}/loss"] for line in whole] == [line["val/loss"] for line in found]
        assert [line[f"val/{name}/loss"] for line in found] == [line["val/loss"] for line in found]
        report = json.loads(next((run / "cache").glob("val-*/manifest.json")).read_text())["report"]
        targets[name] = report["trained_tokens"]
    for line in whole:
        mean = sum(line[f"val/{name}/loss"] * count for name, count in targets.items()) / sum(targets.values())
        assert line["val/loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_stop_and_go_on(inputs, files, tmp_path, ranks, straight, stop) -> None:
    reference, reference_run = straight
    run = tmp_path / "run"
    config = config_of(inputs, files, run)
    first, second = ranks(2, run_jobs, [(config, {"stop_after": stop}), (config, {})])[0]
    assert first.stopped
    assert first.rows + second.rows == reference.rows
    assert first.losses + second.losses == reference.losses
    assert second.weights_sha256 == reference.weights_sha256
    assert ledger(run) == ledger(reference_run)
    shown = ("step", "train/loss", "data/", "val/")
    assert [{k: r[k] for k in r if k.startswith(shown)} for r in lines(run)] == [
        {k: r[k] for k in r if k.startswith(shown)} for r in lines(reference_run)
    ]


def test_other_shares_or_sets_are_refused_by_name(inputs, files, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    config = config_of(inputs, files, run)
    assert ranks(1, _stopped_after_three, config)[0].stopped
    heavier = config_of(inputs, files, run, "data.train_files.math.weight=3")
    message = ranks(1, _error_of, heavier)[0]
    assert message.startswith("exit 2: ")
    assert "data.train_files.math.weight = 3" in message
    assert "code" not in message
    more = config_of(inputs, files, run, f"data.train_files.more={files['val_math']}")
    message = ranks(1, _error_of, more)[0]
    assert "data sets: more new: " in message
    # Allowed, it goes on with the new shares, and the ledger with the old counts.
    before = ledger(run, "global_step_3")
    allowed = config_of(
        inputs,
        files,
        run,
        "data.train_files.math.weight=3",
        "trainer.allow_changed=[data.train_files.math.weight]",
    )
    second = ranks(1, run_job, allowed)[0]
    after = ledger(run)
    assert len(second.losses) == TOTAL - 3
    taken = Counter("code" if row < 5 else "math" for rows in second.rows for row in rows)
    assert {name: after[name].rows - before[name].rows for name in after} == dict(taken)
    second_epoch = Counter("code" if row < 5 else "math" for rows in second.rows[1:] for row in rows)
    assert second_epoch == {"code": 4, "math": 10}


def _stopped_after_three(config) -> Watched:
    return run_job(config, stop_after=3)


def _error_of(config) -> str:
    from sft_job.errors import JobError

    try:
        run_job(config)
    except JobError as error:
        return f"exit {error.code}: {error}"
    return ""


def test_a_stop_within_a_validation(inputs, files, tmp_path, ranks, straight) -> None:
    """It comes after the first set's rows; the validation is left to the next start, whole."""
    run = tmp_path / "run"
    config = config_of(inputs, files, run)
    stopped, ended = ranks(2, _stopped_in_validation, config)[0]
    assert stopped
    assert ended == TOTAL
    validations = [line for line in lines(run) if "val/loss" in line]
    assert validations == [line for line in lines(straight[1]) if "val/loss" in line]


def _stopped_in_validation(config) -> tuple[bool, int]:
    import sft_job.job as job_module
    from sft_job.checkpoint.start import find_start
    from sft_job.config.load import run_folder
    from sft_job.runtime import StopWish
    from tests.distributed.runs import join_ranks

    stop = StopWish()
    job = job_module.build_job(config, join_ranks(), stop, find_start(config, run_folder(config)))
    seen: list[int] = []

    def note(module: Any, arguments: Any) -> None:
        if not module.training:
            seen.append(1)
            # Rows of code fill one batch; this is within the second set.
            stop.signal = 15 if len(seen) == 2 else stop.signal

    job.module.register_forward_pre_hook(note)
    with job:
        ending = job.run()
    return ending.stopped and ending.state.step == 4, run_job(config).step
