"""What an interrupted run must have in common with an uninterrupted one, and where it has not."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a resumed run computes; times, memory and speed are its own.
_METRICS = ("epoch", "train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/supervised_tokens", "val/loss")
_STATE = ("step", "total_steps", "steps_per_epoch", "epoch", "rows_done", "tokens", "supervised_tokens", "data", "rng")
# Sums over another number of ranks are rounded in another order.
_ROUNDING = {"train/loss": 2e-4, "val/loss": 2e-4, "train/grad_norm": 1e-2}


@dataclass(frozen=True)
class Evidence:
    """What a run left.

    Attributes:
        tensors: name -> SHA-256 of dtype, shape and bytes, of the last checkpoint's model and optimizer.
        weights: SHA-256 of the exported weights, as the job says, and of the exported file.
        state: of ``state.json``.
        metrics: (step, name) -> value, of ``metrics.jsonl``.
        repeated: (step, name) pairs that occur more than once.
        ledger: every optimizer step that any start made, in order.
        folders: names in ``checkpoints/``.
        latest: what the pointer says.
    """

    tensors: dict[str, str]
    weights: tuple[str, str]
    state: dict[str, Any]
    metrics: dict[tuple[int, str], float]
    repeated: list[tuple[int, str]]
    ledger: list[dict[str, Any]]
    folders: list[str]
    latest: str


def gather(run: Path, control: Path) -> Evidence:
    """Read everything that a finished run left; imports torch."""
    final = (run / "checkpoints" / "final").resolve()
    state = json.loads((final / "state.json").read_text())
    exported = final / ("adapter" if (final / "adapter").is_dir() else "huggingface")
    (weights,) = exported.glob("*.safetensors")
    metrics: dict[tuple[int, str], float] = {}
    repeated: list[tuple[int, str]] = []
    for line in (run / "logs" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in _METRICS:
            if name in record:
                key = (record["step"], name)
                # A training line and a validation line of one step both say what they are about.
                if key in metrics and name != "epoch":
                    repeated.append(key)
                metrics[key] = record[name]
    return Evidence(
        tensors_of(final),
        (state["weights_sha256"], hashlib.sha256(weights.read_bytes()).hexdigest()),
        {name: state[name] for name in _STATE},
        metrics,
        repeated,
        [json.loads(line) for line in (control / "ledger.jsonl").read_text().splitlines()],
        sorted(path.name for path in (run / "checkpoints").iterdir()),
        (run / "checkpoints" / "latest").read_text(),
    )


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, whatever the ranks that wrote it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in stored.items()
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name: _digest(value) for name, value in sorted(state.items())}


def _digest(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(value)
    data = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value
    head = f"{value.dtype} {tuple(value.shape)} ".encode()
    return hashlib.sha256(head + data.numpy().tobytes()).hexdigest()


def differences(reference: Evidence, found: Evidence, *, exact: bool, ledger: bool = True) -> list[str]:
    """Every promise that a run breaks, one line each; empty where it keeps them all.

    Args:
        reference: of the uninterrupted run.
        found: of the interrupted one.
        exact: equal bits; otherwise rows and positions equal, losses within rounding.
        ledger: there is one: the ranks were watched from inside.
    """
    wrong = [
        f"state.{name}: {found.state[name]!r} instead of {value!r}"
        for name, value in reference.state.items()
        if found.state[name] != value
    ]
    wrong += [f"metrics.jsonl: {name} of step {step} twice" for step, name in found.repeated]
    wrong += _metric_differences(reference, found, exact)
    if ledger:
        wrong += _ledger_differences(reference, found, exact)
    hidden = [name for name in found.folders if name.startswith(".")]
    if hidden:
        wrong.append(f"left over in checkpoints/: {', '.join(hidden)}")
    if found.latest != reference.latest:
        wrong.append(f"latest says {found.latest!r}")
    if exact:
        if found.weights != reference.weights:
            wrong.append(f"exported weights {found.weights} instead of {reference.weights}")
        names = reference.tensors.keys() | found.tensors.keys()
        other = sorted(name for name in names if reference.tensors.get(name) != found.tensors.get(name))
        if other:
            wrong.append(f"{len(other)} of {len(names)} tensors of model and optimizer differ: {', '.join(other[:4])}")
    elif reference.tensors.keys() != found.tensors.keys():
        wrong.append("other tensors in the checkpoint")
    return wrong


def _metric_differences(reference: Evidence, found: Evidence, exact: bool) -> list[str]:
    wrong: list[str] = []
    for key in sorted(reference.metrics.keys() | found.metrics.keys()):
        step, name = key
        if key not in found.metrics or key not in reference.metrics:
            wrong.append(
                f"metrics.jsonl: {name} of step {step} " + ("is missing" if key in reference.metrics else "is new")
            )
            continue
        one, other = reference.metrics[key], found.metrics[key]
        tolerance = 0.0 if exact else _ROUNDING.get(name, 0.0)
        if not math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0):
            wrong.append(f"metrics.jsonl: {name} of step {step} is {other!r} instead of {one!r}")
    return wrong


def _ledger_differences(reference: Evidence, found: Evidence, exact: bool) -> list[str]:
    """Each step that any start made, also one that was lost and made again, trained what it should have."""
    wanted = {(entry["step"], entry["rank"]): entry for entry in reference.ledger}
    names = ("rows", "lr", "tokens", "seed", "rng") if exact else ("rows", "lr")
    wrong = []
    done = set()
    for entry in found.ledger:
        right = wanted.get((entry["step"], entry["rank"] if exact else 0))
        done.add(entry["step"])
        if right is None:
            wrong.append(f"step {entry['step']} of rank {entry['rank']} is none of the uninterrupted run's")
            continue
        wrong += [
            f"step {entry['step']}, rank {entry['rank']}, start {entry['start']}: {name} differ"
            for name in names
            if entry[name] != right[name]
        ]
    missing = set(range(1, reference.state["step"] + 1)) - done
    if missing:
        wrong.append(f"steps {sorted(missing)} were never made")
    return wrong


def reference_faults(reference: Evidence) -> list[str]:
    """What is wrong with an uninterrupted run by itself: rows not once an epoch, ranks with equal randomness."""
    wrong = []
    epochs: dict[int, list[int]] = {}
    for entry in reference.ledger:
        if entry["rank"] == 0:
            epoch = (entry["step"] - 1) // reference.state["steps_per_epoch"]
            epochs.setdefault(epoch, []).extend(entry["rows"])
    orders = [tuple(rows) for rows in epochs.values()]
    if any(sorted(rows) != list(range(len(rows))) for rows in orders):
        wrong.append("an epoch does not hold each row once")
    if len(set(orders)) < len(orders):
        wrong.append("two epochs have the same order")
    seeds = [entry["seed"] for entry in reference.ledger]
    if len(set(seeds)) < len(seeds):
        wrong.append("two ranks or two steps draw the same random numbers")
    return wrong
