"""The table of the data benchmark: what was measured, and what was to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_Results = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line: what was measured, what came out, what was to be reached, whether it was (None = no goal)."""

    name: str
    value: str
    goal: str = ""
    met: bool | None = None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """As text."""
        return self.name, self.value, self.goal, "" if self.met is None else "yes" if self.met else "no"


def lines(settings: _Results, results: _Results) -> list[Line]:
    """The table."""
    return [
        *_cold_lines(settings, results),
        _warm_line("warm start to the first batch", _middle(results["warm"], "seconds")),
        _warm_line("the same, files from the disk", _middle(results["warm_from_disk"], "seconds")),
        _memory_line(settings, results["rank_large"], results["rank_small"]),
        _rank_line(f"a batch of {settings['batch_rows']} rows", results["rank_large"]),
        *_long_lines(settings, results["long_rows"]),
        *_many_lines(settings, results["many_files"]),
    ]


def markdown(record: _Results, table: Sequence[Line], libraries: Sequence[str]) -> str:
    """The table with what it was measured on."""
    told = record["machine"]
    versions = ", ".join(f"{name} {told[name]}" for name in ("sft_job", *libraries))
    head = [
        f"# Data pipeline, {record['date'][:10]}",
        "",
        f"{told['cores']} cores of {told['cpu']}, {told['memory_gib']} GiB; Python {told['python']}, {versions};"
        f" commit {told['commit']}. Load before the start: {record['load']}. Medians where something was measured"
        " several times; every value and all settings are in the JSON file of the same name.",
        "",
        "| measured | result | goal | met |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *(f"| {' | '.join(line.cells)} |" for line in table), ""])


def _cold_lines(settings: _Results, results: _Results) -> list[Line]:
    cold, threads, processes = (
        {name: _middle(results[what], name) for name in ("rows_per_second", "tokens_per_second", "rows_per_cpu_second")}
        for what in ("cold", "tokenizers_threads", "tokenizers_processes")
    )
    share, cpu_share = (
        cold[name] / max(threads[name], processes[name]) for name in ("rows_per_second", "rows_per_cpu_second")
    )
    memory = _middle(results["cold"], "peak_own_mib")
    return [
        Line(f"cold tokenisation, {settings['rows']:,} rows", _speed(cold)),
        Line("tokenizers alone, its own threads", _speed(threads)),
        Line("tokenizers alone, one process a core", _speed(processes)),
        Line("cold against the faster of these", f"{share:.0%}", "80 % or more", share >= 0.8),
        Line("the same by CPU time, all processes together", f"{cpu_share:.0%}"),
        Line("own memory of all processes while tokenising", f"{memory:,.0f} MiB at most"),
    ]


def _middle(results: list[dict[str, float]], name: str) -> float:
    return statistics.median(result[name] for result in results)


def _speed(result: dict[str, float]) -> str:
    return f"{result['rows_per_second']:,.0f} rows/s, {result['tokens_per_second']:,.0f} tokens/s"


def _warm_line(name: str, seconds: float) -> Line:
    return Line(name, f"{seconds:.2f} s", "10 s or less", seconds <= 10)


def _memory_line(settings: _Results, large: dict[str, float], small: dict[str, float]) -> Line:
    own, mapped = (large[f"{name}_growth_mib"] - small[f"{name}_growth_mib"] for name in ("RssAnon", "RssFile"))
    name = f"a rank's memory, beyond that with {settings['small_rows']:,} rows"
    value = f"{own + mapped:,.0f} MiB: {own:,.0f} own, {mapped:,.0f} mapped files"
    return Line(name, value, "less than 1 GiB", own + mapped < 1024)


def _rank_line(name: str, result: dict[str, float]) -> Line:
    speed = f"{result['tokens_per_second'] / 1e6:,.1f} million tokens/s"
    return Line(name, f"{result['milliseconds_per_step']:,.1f} ms, {speed}")


def _long_lines(settings: _Results, results: _Results) -> list[Line]:
    cold = results["cold"]
    what = f"{settings['long_rows']:,} rows of {settings['long_row_tokens']:,} tokens"
    memory = f"{results['rank']['RssAnon_growth_mib']:,.0f} MiB beyond its start"
    return [
        Line(f"{what}: cold", f"{cold['seconds']:.1f} s, {cold['tokens_per_second']:,.0f} tokens/s"),
        Line("... own memory of all processes while tokenising", f"{cold['peak_own_mib']:,.0f} MiB at most"),
        _warm_line("... warm start to the first batch", results["warm"]["seconds"]),
        _rank_line("... a batch of 16 rows", results["rank"]),
        _rank_line("... the same for one rank of a Ulysses group of 8", results["rank_of_ulysses_8"]),
        Line("... a rank's own memory", memory),
    ]


def _many_lines(settings: _Results, results: _Results) -> list[Line]:
    found, cold, warm = results["files"], results["cold"], results["warm"]
    what = f"{settings['small_files']:,} files of {settings['small_file_rows']} rows"
    return [
        Line(f"{what}: find them", f"{found['find files']:.2f} s"),
        Line("... footers", f"{found['footers']:.2f} s"),
        Line("... fingerprint", f"{found['fingerprint']:.2f} s"),
        Line("... cold", f"{cold['seconds']:.1f} s, {cold['rows_per_second']:,.0f} rows/s"),
        _warm_line("... warm start to the first batch", warm["seconds"]),
    ]
