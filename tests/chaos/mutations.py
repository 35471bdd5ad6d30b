"""``make mutations``: put known bugs of other trainers back, one at a time, and see which tests turn red.

Each is put into a private copy of the tree by exact replacement; a text that is gone fails loudly, because then nothing
was proved. The exit code is 0 where every bug is caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
_SECONDS = 900


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        name: what it is called.
        file: where it goes, under the root.
        right: text that is there exactly once.
        wrong: what takes its place.
        tests: the tests that should turn red: files, or arguments of pytest.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "mean of means",
        "sft_job/trainer.py",
        "loss = self._module(micro.to(self._runtime.device), num_targets)",
        "loss = self._module(micro.to(self._runtime.device), max(1, int(micro.target_rows.numel())))"
        " / len(micro_batches) / dist.get_world_size()",
        ("tests/distributed/test_layouts.py",),
    ),
    Mutation(
        "rank-0 RNG for all",
        "sft_job/trainer.py",
        "seed_step(self._config.trainer.seed, batch.step, self._runtime.rank)",
        "seed_step(self._config.trainer.seed, batch.step, 0)",
        ("tests/chaos/test_campaign.py",),
    ),
    Mutation(
        "epoch seed lost",
        "sft_job/data/order.py",
        "np.random.SeedSequence([seed % 2**64, epoch])",
        "np.random.SeedSequence([seed % 2**64, 0])",
        ("tests/unit/data/test_order.py", "tests/chaos/test_campaign.py"),
    ),
    Mutation(
        "`latest` before data",
        "sft_job/checkpoint/folder.py",
        "    try:\n        files.rename(temporary, folder)\n",
        "    write_durably(run.latest, folder.name, files)\n    try:\n        files.rename(temporary, folder)\n",
        ("tests/chaos/test_files.py", "-k", "latest or durable"),
    ),
    Mutation(
        "pointer by plain open",
        "sft_job/checkpoint/folder.py",
        "    files.fsync(run.checkpoints)\n    write_durably(run.latest, folder.name, files)\n",
        '    files.fsync(run.checkpoints)\n    run.latest.write_text(folder.name, encoding="utf-8")\n',
        ("tests/chaos/test_files.py", "-k", "latest or durable or pointer"),
    ),
    Mutation(
        "no fsync of files",
        "sft_job/checkpoint/files.py",
        '        self.before("fsync", path)\n        descriptor = os.open(path, os.O_RDONLY)\n',
        "        return\n        descriptor = os.open(path, os.O_RDONLY)\n",
        ("tests/chaos/test_files.py", "-k", "durable"),
    ),
    Mutation(
        "no fsync of what is written",
        "sft_job/checkpoint/files.py",
        '            self.before("fsync", path)\n            os.fsync(stream.fileno())\n',
        "",
        ("tests/chaos/test_files.py", "-k", "durable"),
    ),
    Mutation(
        "checkpoint not verified",
        "sft_job/checkpoint/folder.py",
        'found = damage(folder) if state is not None else f"{STATE_FILE} cannot be read"',
        "found = None",
        ("tests/unit/checkpoint/test_folder.py", "tests/distributed/test_resume.py", "-k", "damaged or newest"),
    ),
    Mutation(
        "secrets stored",
        "sft_job/checkpoint/state.py",
        "key: mask.tree(value) for",
        "key: value for",
        ("tests/unit/checkpoint/test_state.py",),
    ),
)


def check_texts(root: Path = ROOT) -> list[str]:
    """Mutations whose text is not there exactly once, one line each."""
    counts = ((each, (root / each.file).read_text(encoding="utf-8").count(each.right)) for each in MUTATIONS)
    return [f"{each.name}: its text is {count} times in {each.file}" for each, count in counts if count != 1]


def caught_by(mutation: Mutation) -> list[str]:
    """The tests that fail with this bug in the tree."""
    with tempfile.TemporaryDirectory(prefix="sft_mutation_") as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "demo-run", "*.egg-info", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        path = copy / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.right, mutation.wrong), encoding="utf-8")
        environ = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        quiet = ["-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-n0", "-m", "not gpu", *quiet, *mutation.tests]
        # This one looks at the text that was just changed.
        command += ["--deselect", "tests/chaos/test_campaign.py::test_every_mutation_has_its_place_in_the_code"]
        result = subprocess.run(
            command, cwd=copy, env=environ, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if result.returncode not in (0, 1):
            raise AssertionError(f"{mutation.name}: pytest ended with {result.returncode}\n{result.stdout[-3000:]}")
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)


def main() -> int:
    """Try each and show which tests caught it."""
    parser = argparse.ArgumentParser(prog="make mutations", description=__doc__)
    parser.add_argument("--only", help="part of a name")
    only = parser.parse_args().only
    console = Console(highlight=False)
    if wrong := check_texts():
        console.print("\n".join(wrong), markup=False)
        return 2
    table = Table("bug that is put back", "caught by", title="mutations")
    missed = 0
    for mutation in MUTATIONS:
        if only and only not in mutation.name:
            continue
        tests = caught_by(mutation)
        missed += not tests
        shown = [name.rpartition("/")[2] for name in tests]
        more = [f"and {len(shown) - 4} more"] if len(shown) > 4 else []
        table.add_row(mutation.name, "\n".join([*shown[:4], *more]) or "NOTHING")
        console.print(f"{mutation.name}: {len(tests)} red", markup=False)
    console.print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
