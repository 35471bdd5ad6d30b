"""Where a run begins: afresh, at a checkpoint, or nowhere because it is done. Torch-free; only rank 0 looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sft_job.checkpoint.folder import linked, newest_whole, published, state_or_none
from sft_job.checkpoint.manifest import damage
from sft_job.checkpoint.remote import download_newest
from sft_job.checkpoint.state import TO_GO_ON, Changes, RunState, compare_config, read_state
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError, Problem, ProblemsError

START_FILE = "start.txt"
"""In the report folder: the checkpoint that the supervisor verified, empty = none; the ranks do not verify again."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: folder to go on from; None = afresh.
        state: its state.
        finished: the run in this folder is done and nothing was changed that would give it more to do.
        notes: what to tell the user.
    """

    checkpoint: Path | None = None
    state: RunState | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return 0 if self.state is None else self.state.step


def model_fingerprint(folder: Path) -> str:
    """SHA-256 of what the model's config.json says, whatever its layout; '' where it cannot be read."""
    try:
        parsed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()


def fetch_remote(config: JobConfig, run: RunFolder, warn: Callable[[str], None]) -> None:
    """Bring the newest checkpoint of ``trainer.default_hdfs_dir`` into a run folder that has none.

    Raises:
        JobError: 2, 73, 74 or 137, as ``download_newest`` says.
    """
    url = config.trainer.default_hdfs_dir
    if url is not None and config.trainer.resume_mode == "auto":
        download_newest(url, run, warn)


def find_start(config: JobConfig, run: RunFolder) -> Start:
    """Decide where the run begins, by ``trainer.resume_mode`` and what the run folder holds.

    A checkpoint of the run folder itself comes before ``resume_path``: a run that was started from elsewhere and
    then interrupted goes on from its own work.

    Raises:
        JobError: 74 where there are checkpoints but none is usable.
        ProblemsError: 2 where the settings differ from the checkpoint's, or resume_mode forbids to go on.
    """
    own = published(run)
    mode = config.trainer.resume_mode
    if mode == "disable":
        if own:
            raise ProblemsError([_problem_disabled(own[-1], run)])
        return Start()
    notes = [f"{path}: a link, not looked into" for path in linked(run)]
    folder: Path | None = None
    if own:
        # A finished run needs nothing to go on from: its last checkpoint may hold the export alone.
        if own[-1] == run.final.resolve() and state_or_none(own[-1]) is not None and damage(own[-1]) is None:
            last = start_at(own[-1], config, run, notes)
            if last.finished:
                return last
        folder, damaged = newest_whole(own, TO_GO_ON)
        notes += damaged
        if folder is None:
            raise JobError(ExitCode.NO_CHECKPOINT, "no checkpoint of this run is usable:\n" + "\n".join(notes))
    elif config.trainer.resume_path is not None:
        path = Path(config.trainer.resume_path).resolve()
        folder, damaged = newest_whole([path], TO_GO_ON)
        if folder is None:
            raise JobError(ExitCode.NO_CHECKPOINT, f"trainer.resume_path is not usable: {damaged[0]}")
    return start_at(folder, config, run, notes) if folder is not None else Start()


def looks_finished(run: RunFolder) -> bool:
    """Whether the run's newest state says that it is done: a glance, which ``find_start`` has to confirm."""
    states = (state_or_none(folder) for folder in reversed(published(run)))
    state = next((state for state in states if state is not None), None)
    return run.final.exists() and state is not None and state.step >= state.total_steps


def start_at(folder: Path, config: JobConfig, run: RunFolder, notes: Sequence[str] = ()) -> Start:
    """Begin at a checkpoint that is known to be whole.

    Raises:
        ProblemsError: 2 where the settings differ from the checkpoint's.
    """
    state = read_state(folder)
    changes = compare_config(state, config)
    _refuse(changes, state, config, folder)
    told = [f"changed since the checkpoint: {change}" for change in (*changes.longer, *changes.safe)]
    finished = state.step >= state.total_steps and not changes.longer and run.final.exists()
    return Start(folder, state, finished, (*notes, *told))


def _refuse(changes: Changes, state: RunState, config: JobConfig, folder: Path) -> None:
    problems = [
        Problem(
            ExitCode.CONFIG,
            change.key,
            f"the checkpoint {folder.name} was made with {change.old!r}",
            f"set it back, name it in trainer.allow_changed=[{change.key}], or choose another run folder",
            value=change.new,
        )
        for change in changes.refused
    ]
    model = config.model.partial_pretrain
    if (
        model is not None
        and state.model != model_fingerprint(Path(model))
        and "model.partial_pretrain" not in (config.trainer.allow_changed)
    ):
        problems.append(
            Problem(
                ExitCode.CONFIG,
                "model.partial_pretrain",
                f"its config.json differs from the one that {folder.name} was trained with",
                "give the same base model, or choose another run folder",
                value=model,
            )
        )
    if problems:
        raise ProblemsError(problems)


def refuse_other_data(
    start: Start, fingerprint: str, config: JobConfig, sources: Mapping[str, str] | None = None
) -> None:
    """Refuse to go on with other training rows, another tokenizer or another template than the checkpoint's.

    Args:
        start: where the run begins.
        fingerprint: of the present rows.
        config: the settings.
        sources: fingerprint of each named data set, so that those that changed are named.

    Raises:
        ProblemsError: exit code 2.
    """
    # The fingerprint covers options too (max_length, template, ...), which compare_config has judged by name.
    allowed = any(key.partition(".")[0] == "data" for key in config.trainer.allow_changed)
    if start.state is None or start.state.data == fingerprint or allowed:
        return
    changed = _changed_sources(start.state, sources or {})
    raise ProblemsError(
        [
            Problem(
                ExitCode.CONFIG,
                "data.train_files",
                f"{changed}the content of the training files, the tokenizer or the chat template differs from what "
                f"{start.checkpoint} was trained with",
                "give the same data, name data.train_files in trainer.allow_changed, or choose another run folder",
                value=config.data.train_files,
            )
        ]
    )


def _changed_sources(state: RunState, now: Mapping[str, str]) -> str:
    before = {name: source.data for name, source in state.sources.items() if source.data}
    texts = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    shown = [f"{', '.join(names)} {word}" for word, names in texts.items() if names]
    return f"data sets: {'; '.join(shown)}: " if shown else ""


def _problem_disabled(newest: Path, run: RunFolder) -> Problem:
    return Problem(
        ExitCode.CONFIG,
        "trainer.resume_mode",
        f"the run folder {run.root} already holds {newest.name}, and starting over would mix two runs",
        "use resume_mode: auto to go on, or another CHECKPOINT_DIR to start over",
        value="disable",
    )
