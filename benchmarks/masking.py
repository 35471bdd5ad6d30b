"""Measures what masking conversations costs over plain rendering and tokenising: ``python benchmarks/masking.py``.

Every chunk of conversations is rendered and tokenised plainly and with trained spans, one after the other in turns, in
one process for each core, so that what else the machine does weighs on both alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import texts
from rich.console import Console

from sft_job.data.conversation import Conversation, conversation
from sft_job.data.messages import MessageRenderer, Rejected
from sft_job.data.tokenizer import load_tokenizer
from sft_job.data.workers import available_cores

_TEMPLATES = Path(__file__).parents[1] / "tests" / "golden" / "templates"
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_CHUNK = 500
_TOOL = {
    "type": "function",
    "function": {
        "name": "neighbours",
        "description": "Nodes next to a node",
        "parameters": {"type": "object", "properties": {"node": {"type": "integer"}}},
    },
}


@dataclass(frozen=True)
class Chunk:
    """What one chunk took.

    Attributes:
        plain: seconds of the processor for rendering and tokenising.
        masked: seconds of the same with trained spans.
        tokens: of its conversations.
        trained: of these.
        rejected: conversations whose spans were not proved.
    """

    plain: float
    masked: float
    tokens: int
    trained: int
    rejected: int


def conversations(seed: int, count: int, tokens: int) -> list[Conversation]:
    """Questions and answers, a fifth of them with thoughts, a fifth with calls of a tool."""
    rng = random.Random(seed)
    whole = "\n\n".join(_prose())
    found: list[Conversation] = []

    def text(share: float) -> str:
        characters = int(4 * tokens * share * rng.lognormvariate(-0.18, 0.6))
        start = rng.randrange(len(whole) - characters)
        return whole[start : start + characters].strip() or "."

    for _ in range(count):
        kind = rng.random()
        turns = rng.randint(1, 4)
        messages: list[dict[str, Any]] = [{"role": "system", "content": text(0.05)}] if rng.random() < 0.5 else []
        for _ in range(turns):
            messages.append({"role": "user", "content": text(0.3 / turns)})
            thoughts = {"reasoning_content": text(0.2 / turns)} if kind < 0.2 else {}
            if kind > 0.8:
                call = {"function": {"name": "neighbours", "arguments": {"node": rng.randrange(99)}}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "content": text(0.1 / turns)})
            messages.append({"role": "assistant", "content": text(0.6 / turns), **thoughts})
        read = conversation(messages, [_TOOL] if kind > 0.8 else None)
        assert isinstance(read, Conversation)
        found.append(read)
    return found


@functools.cache
def _prose() -> list[str]:
    return texts.prose()


@functools.cache
def _renderer(folder: Path, template: str) -> MessageRenderer:
    return MessageRenderer(load_tokenizer(folder), chat_template=(_TEMPLATES / f"{template}.jinja").read_text())


def measure(folder: Path, template: str, seed: int, tokens: int) -> Chunk:
    """One chunk, plainly and masked; which of them goes first alternates."""
    renderer = _renderer(folder, template)
    chunk = conversations(seed, _CHUNK, tokens)
    seconds = {"plain": 0.0, "masked": 0.0}
    rows: list[Any] = []
    for what in ("plain", "masked") if seed % 2 else ("masked", "plain"):
        start = time.process_time()
        if what == "plain":
            made = renderer.template.render([each.messages for each in chunk], tools=[each.tools for each in chunk])
            renderer.encoder.encode(made)
        else:
            rows = renderer.render(chunk)
        seconds[what] = time.process_time() - start
    good = [row for row in rows if not isinstance(row, Rejected)]
    return Chunk(
        **seconds,
        tokens=sum(len(row.ids) for row in good),
        trained=sum(row.num_targets for row in good),
        rejected=len(rows) - len(good),
    )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=600, help="of a conversation on average, about")
    parser.add_argument("--templates", nargs="+", default=["qwen3"], help="names in tests/golden/templates")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console = Console()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "tokenizer"
        texts.train_tokenizer(folder, _prose(), seed=0)
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            for template in options.templates:
                run = functools.partial(measure, folder, template, tokens=options.tokens)
                list(pool.map(run, range(4 * options.workers)))  # warm: imports, templates, the tokenizer's cache
                began = time.perf_counter()
                chunks = list(pool.map(run, range(1000, 1000 + -(-options.rows // _CHUNK))))
                results[template] = _summary(chunks, time.perf_counter() - began)
                console.print(template, results[template])
    if options.out:
        settings = {"rows": options.rows, "tokens": options.tokens, "workers": options.workers}
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": available_cores(),
            "python": platform.python_version(),
        }
        machine |= {name: version(name) for name in _LIBRARIES}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "machine": machine, "results": results}, indent=1))


def _summary(chunks: list[Chunk], wall: float) -> dict[str, Any]:
    plain, masked = sum(chunk.plain for chunk in chunks), sum(chunk.masked for chunk in chunks)
    ratios = sorted(chunk.masked / chunk.plain for chunk in chunks)
    rows = len(chunks) * _CHUNK
    return {
        "rows": rows,
        "tokens": sum(chunk.tokens for chunk in chunks),
        "trained": sum(chunk.trained for chunk in chunks),
        "rejected": sum(chunk.rejected for chunk in chunks),
        "plain_microseconds_per_row": round(1e6 * plain / rows, 1),
        "masked_microseconds_per_row": round(1e6 * masked / rows, 1),
        "ratio": round(masked / plain, 3),
        "ratio_median_of_chunks": round(statistics.median(ratios), 3),
        "ratio_90_percent": [round(ratios[len(ratios) // 20], 3), round(ratios[-1 - len(ratios) // 20], 3)],
        "wall_seconds": round(wall, 1),
    }


if __name__ == "__main__":
    main()
