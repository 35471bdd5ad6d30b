"""Bad configs: mutations of a good one, each taken down the whole road of ``sft-job check``.

``python -m tests.chaos.fuzz --number 10000`` (``make fuzz N=10000``) tries many; a test tries some hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_job.config.fields import leaf_fields
from sft_job.contract import ExitCode
from tests.yaml_pieces import PIECES, changed_text

SEED_YAML = Path(__file__).parents[1] / "golden" / "seed_sft_trainer.yaml"
SECONDS = 20.0
"""No config takes longer to be judged."""
LONGEST = 200_000
_TELL_SECONDS = 30.0
_MEMORY = 12 << 30
"""Bytes of addresses: a config that takes them is a fault with a traceback, not the end of the machine."""
ANSWERS = frozenset(ExitCode) - {ExitCode.BUG}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " "),
    *(
        "a",
        "no",
        "auto",
        "null",
        "???",
        "${trainer.seed}",
        "${oc.env:NOT_SET}",
        "\0",
        "é" * 1000,
        "x" * 100_000,
        "1e-5",
    ),
    *([], [[]], [None], [1, "a"], ["a"] * 1000, {}, {"a": 1}, {"a": {"b": {"c": []}}}, {1: 2}, "/dev/null", "/", "."),
    *("../x\n", "-rf", "$(true)", "`true`", "; true", "a b", "\t", "2020-01-01", "0b11", "0o17", "1_000", "+1", "١٢"),
)


@dataclass(frozen=True)
class Answer:
    """What one config was answered with: an exit code, or what was wrong with the answer."""

    code: int
    seconds: float
    fault: str = ""


def base_config(inputs: Path) -> dict[str, Any]:
    """The seed's settings with paths that are there."""
    tree = yaml.safe_load(SEED_YAML.read_text(encoding="utf-8"))
    tree["data"] |= {"train_files": f"{inputs}/train.parquet", "val_files": f"{inputs}/val.parquet", "max_length": 256}
    tree["model"] |= {"partial_pretrain": f"{inputs}/plain"}
    tree["ulysses_sequence_parallel_size"] = 1
    return tree


def mutant(tree: dict[str, Any], seed: int) -> tuple[bytes, list[str]]:
    """The n-th bad config: the file's bytes, and words of the command line."""
    draw = random.Random(seed)
    kind = draw.randrange(10)
    if kind < 4:
        return _as_bytes(changed_text(yaml.safe_dump(tree), draw)), []
    if kind < 8:
        return _as_bytes(yaml.safe_dump(_changed_tree(tree, draw), allow_unicode=True)), []
    if kind < 9:
        words = [f"{_key(draw)}={draw.choice([*PIECES, *map(str, VALUES)])}" for _ in range(draw.randint(1, 4))]
        return _as_bytes(yaml.safe_dump(tree)), [word[: draw.choice([len(word), 40])] for word in words]
    data = bytearray(yaml.safe_dump(tree).encode())
    for _ in range(draw.randint(1, 20)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    text = yaml.safe_dump(tree)
    encoded = [
        bytes(data),
        text.encode("utf-16"),
        text.encode("utf-32"),
        text.encode("utf-8-sig"),
        text.encode("cp500"),
    ]
    return draw.choice([encoded[0], encoded[0], *encoded]), []


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _changed_tree(tree: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    import copy

    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 4)):
        *sections, name = _key(draw).split(".")
        place: Any = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        action = draw.randrange(6)
        if action == 0:
            place.pop(name, None)
        elif action == 1:
            place["".join(draw.choices(string.ascii_lowercase + "_", k=draw.randint(1, 12)))] = draw.choice(VALUES)
        else:
            place[name] = draw.choice(VALUES)
    return tree


def _key(draw: random.Random) -> str:
    keys = list(leaf_fields())
    return draw.choice([*keys, draw.choice(keys).rpartition(".")[0] or "data"])


def bombs() -> Iterator[tuple[str, bytes]]:
    """Files that are made to be expensive or that readers stumble over, by name."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    yield "aliases that double", ("a0: &a0 [x, x]\n" + "\n".join(levels)).encode()
    many = "a0: &a0 {k: v}\n" + "\n".join(f"k{n}: {{<<: [{', '.join(['*a0'] * 40)}]}}" for n in range(4500))
    yield "a megabyte of merges", many.encode()[:999_000]
    flat = "&a [" + "x, " * 1000 + "x]\nb: [" + "*a, " * 240_000 + "*a]"
    yield "a megabyte of aliases", ("a: " + flat).encode()[:999_000]
    yield "an alias of itself", b"data: &a {train_files: [*a]}"
    yield "deep lists", b"data: " + b"[" * 400_000
    yield "deep maps", b"".join(b" " * n + b"a:\n" for n in range(1200))
    yield "deep braces", b"data: " + b"{a: " * 200_000
    yield "deep interpolations", b"trainer: {project_name: '" + b"${a:" * 100_000 + b"'}"
    yield (
        "interpolations of each other",
        b"trainer: {project_name: '${trainer.experiment_name}', experiment_name: '${trainer.project_name}'}",
    )
    yield "a long line", b"trainer: {project_name: '" + b"x" * 990_000 + b"'}"
    yield "many keys", b"".join(b"k%d: 1\n" % n for n in range(90_000))
    yield "many problems", b"data:\n" + b"".join(b"  k%d: 1\n" % n for n in range(60_000))
    yield "duplicate keys", b"data: {max_length: 1, max_length: 2}\ndata: {}\n"
    yield "a huge number", b"data: {max_length: " + b"9" * 100_000 + b"}"
    yield "a huge float", b"optim: {lr: 1e" + b"9" * 10_000 + b"}"
    yield "a huge sexagesimal", b"trainer: {seed: " + b"59:" * 50_000 + b"59}"
    yield "NUL", b"data:\n  train_files: a\0b\n"
    yield "only NUL", b"\0" * 1000
    yield "BOM", b"\xef\xbb\xbfdata: {max_length: 1}\n"
    yield "two BOMs", b"\xef\xbb\xbf\xef\xbb\xbfdata: {}\n"
    yield "UTF-16", "data: {max_length: 1}".encode("utf-16")
    yield "UTF-32", "data: {max_length: 1}".encode("utf-32")
    yield "Latin-1", "trainer: {project_name: Übung}".encode("latin-1")
    yield "tabs", b"data:\n\tmax_length: 1\n"
    yield "two documents", b"data: {}\n---\ndata: {}\n"
    yield "a list", b"- a\n- b\n"
    yield "a word", b"hello"
    yield "nothing", b""
    yield "only a comment", b"# nothing\n"
    yield "an object of Python's", b"data: !!python/object/apply:os.system ['exit 1']\n"
    yield "control characters", b"trainer: {project_name: \x1b[31m}"
    yield "lone surrogate", b"trainer: {project_name: '\xed\xa0\x80'}"
    yield "too large", b"# " + b"x" * 5_000_000


def answer(content: bytes, overrides: list[str], environ: dict[str, str]) -> Answer:
    """How ``sft-job check`` answers a config; in this process, nothing is started."""
    from sft_job.check import check_job
    from sft_job.errors import JobError

    shown = io.StringIO()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sft_fuzz_") as folder:
        path = Path(folder) / "job.yaml"
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                code = int(check_job(str(path), overrides, environ | {"CHECKPOINT_DIR": folder}))
        except JobError as error:  # the command shows it and ends with its code
            code = int(error.code)
        except (Exception, SystemExit):
            return Answer(1, time.monotonic() - began, traceback.format_exc())
    seconds = time.monotonic() - began
    if code not in ANSWERS:
        return Answer(code, seconds, f"exit code {code}:\n{shown.getvalue()[-2000:]}")
    if "Traceback (most recent call last)" in shown.getvalue():
        return Answer(code, seconds, shown.getvalue()[-3000:])
    if len(shown.getvalue()) > LONGEST:
        return Answer(code, seconds, f"{len(shown.getvalue())} characters on one screen")
    if seconds > SECONDS:
        return Answer(code, seconds, f"took {seconds:.0f} s")
    return Answer(code, seconds)


def main() -> int:
    """Try many; 0 where every one of them was answered well."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one; each is made from its own")
    given = parser.parse_args()
    from tests.chaos.inputs import make_inputs

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    began = told = time.monotonic()
    codes: Counter[int] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="sft_fuzz_inputs_") as folder:
        make_inputs(Path(folder))
        tree = base_config(Path(folder))
        environ = {"NPROC_PER_NODE": "1"}
        for seed in range(given.first, given.first + given.number):
            content, overrides = mutant(tree, seed)
            got = answer(content, overrides, environ)
            codes[got.code] += 1
            if got.fault:
                faults += 1
                _say(f"config {seed} {overrides} ({got.seconds:.1f} s): {got.fault}")
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                _say(f"... {codes.total()} of {given.number} in {told - began:.0f} s, {faults} answered badly")
    shown = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
    seconds = time.monotonic() - began
    _say(f"{given.number} configs in {seconds:.0f} s, {faults} answered badly; exit codes {shown}")
    return 1 if faults else 0


def _say(line: str) -> None:
    """Also where nobody sits before a screen: what was found must not wait in a buffer for an end that may not come."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
