"""From what the runs left to figures: one dict and one table line a run, one verdict a row."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.rows import Row

Figures = dict[str, Any]
_WASTE = ("padding", "token_imbalance")


def figures(run: Mapping[str, Any]) -> Figures:
    """What a run measured; only what is known of one that did not come to its end.

    Args:
        run: with ``ranks`` (what each of its processes left), ``warmup``, and ``step_seconds`` by the host's clock
            where the processes left none.
    """
    ranks: Sequence[Mapping[str, Any]] = run["ranks"]
    world = max(1, run["side"]["ranks"])
    by_rank = [rank["step_seconds"] for rank in ranks if rank.get("step_seconds")] or [run.get("step_seconds") or []]
    seconds = [max(each) for each in zip(*by_rank, strict=False)]
    found: Figures = {"first_step_seconds": seconds[0] if seconds else None, "all_step_seconds": seconds}
    first = ranks[0] if ranks else {}
    for name in (
        "losses",
        "grad_norms",
        "data_wait_seconds",
        "seconds_to_build",
        "seconds_to_first_step",
        "seconds_all",
        "versions",
        "config",
    ):
        found[name] = first.get(name) or run.get(name)
    found["memory"] = _largest([rank.get("memory") or {} for rank in ranks])
    ceilings = [rank[name]["tflops"] for rank in ranks for name in ("ceiling_before", "ceiling_after") if name in rank]
    found["ceilings_tflops"] = ceilings
    found["warm_ceilings_tflops"] = [
        rank[name]["warm"]["tflops"]
        for rank in ranks
        for name in ("ceiling_before", "ceiling_after")
        if "warm" in rank.get(name, {})
    ]
    later = seconds[run["warmup"] :]
    if not later:
        return found
    found |= {"steps": len(later), "step_seconds": spread(later)}
    tokens, flops = (first.get(name) or run.get(name) for name in ("tokens", "flops"))
    if tokens:
        of_steps = list(zip(tokens[run["warmup"] :], later, strict=False))
        found["tokens_per_second_per_gpu"] = spread([count / took / world for count, took in of_steps])
        found["tokens_of_step"] = statistics.mean(count for count, _ in of_steps)
    if flops:
        rates = [each / took / world / 1e12 for each, took in zip(flops[run["warmup"] :], later, strict=False)]
        found["model_tflops_per_gpu"] = spread(rates)
    computed = [rank["computed_tokens"] for rank in ranks if rank.get("computed_tokens")]
    if tokens and len(computed) == world:
        found |= waste(computed, tokens, run["side"]["settings"].get("ulysses_sequence_parallel_size", 1))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the values that a tenth lies below and above."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def waste(computed: Sequence[Sequence[int]], tokens: Sequence[int], ulysses: int) -> dict[str, float]:
    """Padding over real tokens, and how much more the busiest rank had than the mean, over all steps.

    Args:
        computed: [rank][step] tokens of the packs that a rank worked on; ranks of a Ulysses group share theirs.
        tokens: [step] real tokens over all ranks.
        ulysses: ranks of a group.
    """
    steps = list(zip(*computed, strict=True))
    packs = sum(sum(step) for step in steps) / ulysses
    most, mean = sum(max(step) for step in steps), sum(statistics.mean(step) for step in steps)
    return {"padding": packs / sum(tokens) - 1, "token_imbalance": most / mean - 1}


def _largest(memories: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for memory in memories for name in memory}
    return {name: max(memory.get(name, 0.0) for memory in memories) for name in sorted(names)}


def gate(
    losses: Sequence[float], reference: Sequence[float], limits: tuple[float, float], *, must_move: bool = True
) -> Figures:
    """Whether losses are those of the reference: the largest relative difference of the first 5 and the first 20.

    Args:
        losses: of each step.
        reference: of each step; a run that has fewer is compared over these.
        limits: of the first 5, of the first 20.
        must_move: refuse a reference that a run which learns nothing would pass, its first value at every step.

    Returns:
        ``passed`` is None where nothing is proved, and ``why`` says it.
    """
    pairs = list(zip(losses, reference, strict=False))[:20]
    if not pairs:
        return {"passed": None, "why": "no losses"}
    first, all_ = _differences(pairs)
    found: Figures = {"steps": len(pairs), "first_5": first, "first_20": all_, "limits": list(limits)}
    passed = first <= limits[0] and all_ <= limits[1]
    idle = _differences([(reference[0], right) for _, right in pairs])
    found["idle_20"] = idle[1]
    if passed and must_move and idle[0] <= limits[0] and idle[1] <= limits[1]:
        return {"passed": None, "why": "the reference's losses stand still", **found}
    return {"passed": passed, **found}


def _differences(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    relative = [abs(ours - right) / abs(right) for ours, right in pairs]
    return max(relative[:5]), max(relative)


def verdict(row: Row, runs: Sequence[Mapping[str, Any]], ceiling: float | None, warm: float | None = None) -> Figures:
    """The row's subject, before and after, against the fastest of its partners and its losses' reference.

    Args:
        row: which.
        runs: all of the sitting.
        ceiling: the card's rate of products, TFLOP/s; the highest that was seen.
        warm: the same of a card under load.
    """
    parts = {part: [run for run in runs if _is(run, row, part)] for part in ("A", "A'", "B", "R")}
    own = [rate for run in (*parts["A"], *parts["A'"]) if (rate := _median(run, "tokens_per_second_per_gpu"))]
    found: Figures = {"row": row.name, "goals": row.goals, "ours_tokens_per_second_per_gpu": own}
    if not own:
        return found
    mean = statistics.mean(own)
    found["a_to_a"] = (max(own) - min(own)) / mean
    found |= {name: value for run in parts["A"] for name, value in run["figures"].items() if name in _WASTE}
    tflops = [rate for run in (*parts["A"], *parts["A'"]) if (rate := _median(run, "model_tflops_per_gpu"))]
    if tflops:
        found["ours_model_tflops_per_gpu"] = statistics.mean(tflops)
        found["of_ceiling"] = found["ours_model_tflops_per_gpu"] / ceiling if ceiling else None
        found["of_warm_ceiling"] = found["ours_model_tflops_per_gpu"] / warm if warm else None
    partners = [run for run in parts["B"] if _median(run, "tokens_per_second_per_gpu")]
    if partners:
        best = max(partners, key=lambda run: _median(run, "tokens_per_second_per_gpu") or 0.0)
        found["partner"] = best["side"]["name"]
        found["ratio_tokens"] = mean / (_median(best, "tokens_per_second_per_gpu") or 1.0)
        found["ratio_tflops"] = found["ours_model_tflops_per_gpu"] / (_median(best, "model_tflops_per_gpu") or 1.0)
        if not best["side"]["settings"].get("packing"):
            # The same rows and weights must give the same losses; adapters are drawn anew, so theirs are only alike.
            losses = [run["figures"].get("losses") or [] for run in [*(parts["A"] or parts["A'"])[:1], best]]
            found["losses_to_partner"] = gate(losses[0], losses[1], row.gate)
    if parts["R"] and parts["A"]:
        reference = parts["R"][0]["figures"]
        subject = parts["A"][0]["figures"]
        found["gate"] = gate(subject.get("losses") or [], reference.get("losses") or [], row.gate)
        found["gate_grad_norms"] = gate(
            subject.get("grad_norms") or [], reference.get("grad_norms") or [], (0.02, 0.05), must_move=False
        )
    return found


def _is(run: Mapping[str, Any], row: Row, part: str) -> bool:
    """Whether a run is that part of a row: partners and references may have run for a neighbour."""
    wanted = {"A": [row.subject], "A'": [row.subject], "B": row.partners, "R": [row.reference()]}[part]
    own = run["row"] == row.name or part in ("B", "R")
    same = run["part"] == part and run["shape"] == row.shape and run["side"] in [asdict(side) for side in wanted]
    return own and same


def _median(run: Mapping[str, Any], name: str) -> float | None:
    value = run["figures"].get(name)
    return value["median"] if value else None


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of everything that was measured."""
    machine, ceiling, warm = record["machine"], record.get("ceiling_tflops"), record.get("warm_ceiling_tflops")
    lines = [
        f"{machine['gpu'] or 'CPU'}, torch {machine['versions'].get('torch')}, {record['started']}, "
        f"commit {machine['commit']}; ceiling (bf16, 8192^3, this run) "
        + (f"{ceiling:.0f} TFLOP/s" if ceiling else "not known")
        + (f", of a card under load {warm:.0f}" if warm else ""),
        "",
        "| row | part | side | steps | s/step (p10 to p90) | tok/s per GPU | model TFLOP/s | of ceiling (under load) "
        "| peak GiB (reserved) | built, first step begun s | first step s | state |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(run, ceiling, warm) for run in record["runs"]),
        "",
        "| row | ours tok/s | fastest partner | tok/s ratio | TFLOP/s ratio | A to A' | of ceiling (under load) "
        "| padding, imbalance | losses as the reference's | wanted |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_verdict_line(each) for each in record["verdicts"]),
    ]
    return "\n".join(lines) + "\n"


def _line(run: Mapping[str, Any], ceiling: float | None, warm: float | None) -> str:
    found = run["figures"]
    took, memory = found.get("step_seconds"), found.get("memory") or {}
    tflops = _median(run, "model_tflops_per_gpu")
    cells = [
        run["row"],
        run["part"],
        run["side"]["name"],
        str(found.get("steps", 0)),
        f"{took['median']:.3f} ({took['p10']:.3f} to {took['p90']:.3f})" if took else "-",
        _shown(_median(run, "tokens_per_second_per_gpu"), ",.0f"),
        _shown(tflops, ".1f"),
        _shares(tflops, ceiling, warm),
        _memory(memory),
        f"{_shown(found.get('seconds_to_build'), '.1f')}, {_shown(found.get('seconds_to_first_step'), '.1f')}",
        _shown(found.get("first_step_seconds"), ".1f"),
        run["state"],
    ]
    return f"| {' | '.join(cells)} |"


def _shares(tflops: float | None, ceiling: float | None, warm: float | None) -> str:
    shares = [_shown(tflops / rate if tflops and rate else None, ".3f") for rate in (ceiling, warm)]
    return f"{shares[0]} ({shares[1]})"


def _memory(memory: Mapping[str, float]) -> str:
    if "allocated_gib" not in memory:
        return "-"
    text = f"{memory['allocated_gib']:.1f} ({memory['reserved_gib']:.1f})"
    inputs = memory.get("host_inputs_gib")
    return text if inputs is None else f"{text}; host {memory.get('host_gib', 0.0):.1f}, {inputs:.1f} of it inputs"


def _verdict_line(found: Mapping[str, Any]) -> str:
    own = found["ours_tokens_per_second_per_gpu"]
    cells = [
        found["row"],
        _shown(statistics.mean(own) if own else None, ",.0f"),
        found.get("partner", "-"),
        _shown(found.get("ratio_tokens"), ".3f"),
        _shown(found.get("ratio_tflops"), ".3f"),
        _shown(found.get("a_to_a"), ".2%"),
        f"{_shown(found.get('of_ceiling'), '.3f')} ({_shown(found.get('of_warm_ceiling'), '.3f')})",
        f"{_shown(found.get('padding'), '.1%')}, {_shown(found.get('token_imbalance'), '.1%')}",
        _gate_text(found.get("gate") or {}),
        found["goals"],
    ]
    return f"| {' | '.join(cells)} |"


def _gate_text(found: Mapping[str, Any]) -> str:
    if "first_5" not in found:
        return "not compared"
    word = {True: "yes", False: "NO", None: "nothing proved"}[found["passed"]]
    return f"{word} ({found['first_5']:.1e}, {found['first_20']:.1e})" + (f": {found['why']}" if "why" in found else "")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
