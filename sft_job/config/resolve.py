"""From command line and environment to everything known about a run before data and weights are looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sft_job.config.fields import value_at
from sft_job.config.load import Loaded, load_config
from sft_job.config.model_folder import ModelFacts, read_model_folder
from sft_job.config.topology import Topology, read_topology
from sft_job.config.validate import validate
from sft_job.config.verl import ALIASES
from sft_job.contract import ExitCode
from sft_job.errors import Problem

_MODEL = "model.partial_pretrain"
_REQUIRED = {
    "data.train_files": "name the parquet file to train on",
    _MODEL: "name the folder of the base model",
}


@dataclass
class Resolution:
    """Settings, topology and model facts of a run, with all problems found.

    Attributes:
        model: None where the folder could not be read or the settings name none.
        problems: configuration first, then the model; nothing may be started while there is any.
        warnings: lines to show.
    """

    loaded: Loaded
    topology: Topology
    model: ModelFacts | None
    problems: list[Problem]
    warnings: list[str]


def resolve(
    config_arg: str | None,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    gpu_count: int,
    *,
    need_weights: bool = True,
) -> Resolution:
    """Load and check the settings of a run against its topology and model; collects problems and raises none.

    Args:
        config_arg: config file or folder from the command line, None = ``$CONFIG_PATH``.
        overrides: ``key=value`` from the command line.
        environ: environment variables.
        gpu_count: GPUs of this node, from ``count_gpus``.
        need_weights: the model's folder must have its weights, where they are not drawn at random.
    """
    loaded = load_config(config_arg, overrides, environ)
    topology, topology_problems = read_topology(environ, gpu_count)
    problems = [*loaded.problems, *topology_problems]
    model: ModelFacts | None = None
    warnings: list[str] = []
    if loaded.readable:
        # A setting that could not be read has its default value here: no second problem about that.
        faulty = {_setting_of(problem) for problem in problems}
        if topology_problems:
            # The number of ranks is not known.
            faulty |= {"ulysses_sequence_parallel_size", "model.fsdp_config.fsdp_size"}
        path = loaded.config.model.partial_pretrain
        if path and _MODEL not in faulty:
            needed = need_weights and loaded.config.model.init != "random"
            model, model_problems = read_model_folder(path, loaded.origin(_MODEL), needed)
            problems.extend(model_problems)
        found, warnings = validate(loaded.config, topology, model, loaded.origin)
        found = [*_missing(loaded), *found]
        problems.extend(each for each in found if _setting_of(each) not in faulty)
    problems.sort(key=_rank)
    return Resolution(loaded, topology, model, problems, warnings)


def _rank(problem: Problem) -> tuple[bool, bool, int]:
    """Configuration first, and within it the file's problems by line."""
    line = re.fullmatch(r".*:(\d+)", problem.origin)
    return problem.code != ExitCode.CONFIG, line is None, int(line[1]) if line else 0


def _setting_of(problem: Problem) -> str:
    """Full path of the setting that a problem is about, also where it used another name or one item."""
    key = problem.subject.partition("[")[0]
    return ALIASES[key].target if key in ALIASES else key


def _missing(loaded: Loaded) -> list[Problem]:
    return [
        Problem(ExitCode.CONFIG, key, "must be set", fix, origin=loaded.origin(key))
        for key, fix in _REQUIRED.items()
        if value_at(loaded.config, key) in (None, "", [])
    ]
