"""Inputs of the data benchmark: prose and graph problems as parquet rows, and a tokenizer trained on them.

The prose is the docstrings of installed packages: real words in real proportions, on any machine, without a download.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PACKAGES = ("torch", "transformers", "numpy", "pyarrow")
VOCABULARY = 32_768
GRAPH_SHARE = 0.25
SPREAD = 0.6  # half the rows lie between 0.67 and 1.5 times the median
_ROWS_A_GROUP = 20_000
_CHARACTERS_A_TOKEN = {"prose": 4.1, "graph": 1.75}  # about, with the template's tokens
# Words with their space, numbers by up to three digits, signs, spaces: how most of today's tokenizers cut text.
_WORDS = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
<|im_start|>assistant
{{ message['tool_calls'] | tojson }}<|im_end|>
{% else -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def prose() -> list[str]:
    """Paragraphs of the packages' docstrings, each once, in the order of their files."""
    found: dict[str, None] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            for text in re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.DOTALL):
                paragraphs = (paragraph.strip() for paragraph in re.split(r"\n\s*\n", text))
                found |= dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph) >= 80)
    return list(found)


def train_tokenizer(folder: Path, texts: Sequence[str], seed: int) -> int:
    """Write a folder with a byte-level BPE tokenizer and a ChatML template; the size of its vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    graphs = ("\n".join(_graph_problem(rng, 500)) for _ in range(2000))
    bpe.train_from_iterator(itertools.chain(texts, graphs), trainer)
    folder.mkdir(parents=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return bpe.get_vocab_size()


def write_rows(
    folder: Path, texts: Sequence[str], *, rows: int, files: int, tokens: int, seed: int, spread: float = SPREAD
) -> None:
    """Write parquet files with columns ``prompt`` and ``response``.

    Args:
        folder: new folder of the files.
        texts: paragraphs of prose.
        rows: rows in all, spread evenly.
        files: how many files.
        tokens: tokens of a row on average, about.
        seed: the same seed gives the same rows.
        spread: of the lengths' normal distribution in the logarithm; 0 = all about equally long.
    """
    folder.mkdir(parents=True)
    drawn = _rows(texts, tokens, seed, spread)
    for number in range(files):
        left = (number + 1) * rows // files - number * rows // files
        schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", schema, compression="zstd") as writer:
            while left > 0:
                count = min(left, _ROWS_A_GROUP)
                prompts, responses = zip(*itertools.islice(drawn, count), strict=True)
                writer.write_table(pa.table({"prompt": prompts, "response": responses}, schema=schema))
                left -= count


def _rows(texts: Sequence[str], tokens: int, seed: int, spread: float) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    whole = "\n\n".join(texts)
    starts = list(itertools.accumulate((len(text) + 2 for text in texts), initial=0))[:-1]
    scale = tokens / math.exp(spread**2 / 2)
    while True:
        length = scale * rng.lognormvariate(0, spread)
        if rng.random() < GRAPH_SHARE:
            yield _graph_problem(rng, int(length * _CHARACTERS_A_TOKEN["graph"]))
        else:
            yield _prose_problem(rng, whole, starts, int(length * _CHARACTERS_A_TOKEN["prose"]))


def _prose_problem(rng: random.Random, whole: str, starts: Sequence[int], characters: int) -> tuple[str, str]:
    """Go on with a text: the prompt is its first third, the response the rest."""
    text = whole[(start := rng.choice(starts)) : start + characters]
    while len(text) < characters:
        text += whole[(start := rng.choice(starts)) : start + characters - len(text)]
    cut = text.rfind(" ", 0, characters // 3 + 1)
    return f"Go on with this text:\n{text[: max(cut, 1)]}", text[max(cut, 1) :].strip() or "."


def _graph_problem(rng: random.Random, characters: int) -> tuple[str, str]:
    """Edges of a random graph and a walk in it."""
    nodes = max(4, characters // 24)
    edges = [(rng.randrange(nodes), rng.randrange(nodes)) for _ in range(max(4, characters // 14))]
    listed = " ".join(f"{a}-{b}" for a, b in edges)
    start, goal = rng.choice(edges)[0], rng.choice(edges)[1]
    steps = [f"from {a} to {b}" for a, b in edges[: max(2, characters // 40)]]
    prompt = f"A graph has {nodes} nodes and these edges: {listed}\nWhich is the shortest path from {start} to {goal}?"
    return prompt, f"Visit {start}, then {', then '.join(steps)}.\nAnswer: {start}-{goal}"
