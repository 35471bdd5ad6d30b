"""Rules for what every launcher reads from ``job.yaml``: pure, all problems at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, cast

from sft_job.config.fields import fields_of, leaf_fields, value_at
from sft_job.config.secrets import SecretMask
from sft_job.config.verl import ALIASES, FOREIGN
from sft_job.contract import Env, ExitCode
from sft_job.errors import Problem
from sft_job.jobfile.mounts import parse_mount
from sft_job.jobfile.schema import JobFile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE = re.compile(r"[A-Za-z0-9/._:@#+~%=-]+")
# C0, DEL, C1 and the two line separators: each begins a line or moves a cursor somewhere.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# ``export NAME=value``, ``--env=NAME=value``, ``ALL,NAME='a value'``.
_ASSIGNMENT = re.compile(
    r"""(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_]*)\+?=(?=(?P<value>"[^"]*"|'[^']*'|[^\s,;&|"']*))"""
)
# A key as it is, and not one that is read somewhere: ``wandb login $KEY``.
_LOGIN = re.compile(r"""\b(?:Bearer|wandb\s+login(?:\s+--\S+)*)\s+["']?(?![-$`"'])[\w.~+/=-]{8}""", re.IGNORECASE)
_HEXADECIMAL = re.compile(r"\b[0-9a-f]{40}\b", re.IGNORECASE)
_COMMIT = re.compile(r"\b(?:git|commit|revision|rev|sha|sha1|checksum)(?=\b|_)", re.IGNORECASE)
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_OURS = (
    Env.CONFIG_PATH,
    Env.CONFIG_NAME,
    Env.CHECKPOINT_DIR,
    Env.NPROC_PER_NODE,
    Env.NNODES,
    Env.NODE_RANK,
    Env.MASTER_ADDR,
    Env.MASTER_PORT,
    Env.JOB_ID,
    Env.END_TIME,
    Env.GPUS_PER_NODE,
    Env.REPORT_DIR,
    Env.LOCK,
    Env.DEADLINE,
    Env.SUPERVISOR,
    Env.STORE_FD,
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)
OURS = frozenset((*_OURS, *(f"PET_{name}" for name in _OURS)))
"""Variables that launchers and the job set."""
# Of the image and of launchers, which a shell may hand on.
_NOT_GIVEN = frozenset((Env.COMMIT, "SFT_JOB_NAMESPACE"))
_MOST_NODES, _MOST_PARTS = 100_000, 100_000
_MOST_GIB = 2**20
MOST_SECONDS = 2**31 - 1
"""What schedulers take for ids and seconds."""


def is_set_by_launcher(name: str) -> bool:
    """Whether launchers, operators, the image or the job itself set this variable."""
    return name in OURS or name in _NOT_GIVEN or name.startswith("PET_")


def validate(job: JobFile) -> list[Problem]:
    """Everything that is wrong with the part that every launcher reads."""
    problems = text_problems(job, "", may_begin_with_dash=frozenset({"environment"}))
    check = Checks(problems)
    check(_NAME.fullmatch(job.name), "name", "must be letters, digits, '.', '_' and '-', at most 100", value=job.name)
    check(job.config, "config", "must name the run's YAML file", "config: sft_trainer.yaml")
    check(
        job.checkpoint_dir, "checkpoint_dir", "must name a folder that every node sees", "checkpoint_dir: /shared/run"
    )
    for name in ("config", "checkpoint_dir"):
        check("%" not in getattr(job, name), name, "must hold no %", value=getattr(job, name))
    check(job.image is None or _IMAGE.fullmatch(job.image), "image", "must be an image's name or path", value=job.image)
    for at, each in enumerate(job.overrides):
        key, equals, _ = each.partition("=")
        check(equals and key.strip(), f"overrides[{at}]", "must have the form key=value", value=each)
        check_assignments(check, f"overrides[{at}]", each, _names_of_settings())
    for at, each in enumerate(job.mounts):
        try:
            parse_mount(each)
        except ValueError as error:
            check(False, f"mounts[{at}]", str(error), value=each)
    _check_environment(job, check)
    numbers = job.resources
    check.within(1, _MOST_NODES, "resources.nodes", numbers.nodes)
    check.within(0, _MOST_PARTS, "resources.gpus_per_node", numbers.gpus_per_node)
    check.within(1, _MOST_PARTS, "resources.ranks_per_node", numbers.ranks_per_node)
    check.within(1, _MOST_PARTS, "resources.cpus_per_node", numbers.cpus_per_node)
    check.within(0, _MOST_GIB, "resources.memory_gib", numbers.memory_gib)
    check.within(0, _MOST_GIB, "resources.shm_gib", numbers.shm_gib)
    ranks, gpus = numbers.ranks_per_node, numbers.gpus_per_node
    check(
        not (ranks and gpus and ranks > gpus),
        "resources.ranks_per_node",
        f"each rank needs a GPU of its own: {ranks} ranks, {gpus} GPUs",
        value=ranks,
    )
    check.within(1, MOST_SECONDS, "grace_seconds", job.grace_seconds)
    for name in ("timeouts", "preemptions", "losses"):
        check.at_least(0, f"retries.{name}", getattr(job.retries, name))
    check.at_least(1, "retries.without_checkpoint", job.retries.without_checkpoint)
    if numbers.time is not None and seconds_of(numbers.time) is None:
        check(False, "resources.time", "must be minutes, HH:MM:SS or DAYS-HH:MM:SS", "24:00:00", numbers.time)
    elif (seconds_of(numbers.time or "") or 0) > MOST_SECONDS:
        check(False, "resources.time", f"must be at most {MOST_SECONDS} s", "24:00:00", numbers.time)
    elif numbers.time is not None and (seconds_of(numbers.time) or 0) <= job.grace_seconds:
        rule = f"is not longer than grace_seconds ({job.grace_seconds} s): every start would end before its first step"
        check(False, "resources.time", rule, "a longer time, or smaller grace_seconds", numbers.time)
    return problems


def _check_environment(job: JobFile, check: Checks) -> None:
    for name, value in job.environment.items():
        subject = f"environment.{name}"
        rule = "a variable's name is letters, digits and _"
        check(_VARIABLE.fullmatch(name), subject, rule, value=name)
        check(
            not is_set_by_launcher(name),
            subject,
            "the launcher sets this variable itself",
            "remove it; resources say it",
        )
        _check_secret(check, subject, name, value)
    for at, name in enumerate(job.secrets):
        check(_VARIABLE.fullmatch(name), f"secrets[{at}]", "must be the name of a variable", value=name)


def check_assignments(check: Checks, subject: str, text: str, known: Set[str] = frozenset()) -> None:
    """Refuse a text in which a variable gets a secret as it is; one that is read somewhere (``$(cat ...)``) may stand.

    Args:
        check: takes the problem.
        subject: what the text is.
        text: such as a shell line or an option.
        known: names that mean something else.
    """
    for found in _ASSIGNMENT.finditer(text):
        name, value = found["name"], found["value"].strip("\"'")
        if name not in known and not value.startswith(("$", "`")):
            _check_secret(check, subject, name, value)


def check_literals(check: Checks, subject: str, text: str) -> None:
    """Refuse a command or an option with a secret that no variable's name gives away.

    Args:
        check: takes the problem.
        subject: what the text is.
        text: such as a shell line or an option.
    """
    found = _LOGIN.search(text) or (None if _COMMIT.search(text) else _HEXADECIMAL.search(text))
    fix = "list a variable's name under secrets, export it where you submit, and write $NAME here"
    check(found is None, subject, "looks like a secret, which has no place in a file", fix)


def _check_secret(check: Checks, subject: str, name: str, value: str) -> None:
    fix = f"list its name: secrets: [{name}], and export {name} where you submit"
    secret = SecretMask({name: value}).text(value) != value
    check(not secret, subject, "looks like a secret, which has no place in a file", fix)


def _names_of_settings() -> frozenset[str]:
    """Last parts of the keys of the run's config: ``data.prompt_key=question`` is none."""
    return frozenset(key.rpartition(".")[2] for key in (*leaf_fields(), *ALIASES, *FOREIGN))


class Checks:
    """Adds a problem wherever something does not hold."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems

    def __call__(self, holds: object, subject: str, rule: str, fix: str = "", value: Any = None) -> None:
        """Note a problem unless it holds."""
        if not holds:
            more = {} if value is None else {"value": value}
            self._problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, **more))

    def at_least(self, lowest: int, subject: str, value: float | None) -> None:
        """A number that is set must not be lower (and not infinite or NaN)."""
        good = value is None or lowest <= value < 1e15
        self(good, subject, f"must be {lowest} or more", value=value)

    def within(self, lowest: int, most: int, subject: str, value: float | None) -> None:
        """A number that is set must lie between these (and not be infinite or NaN)."""
        rule = (
            f"must be {lowest} or more" if value is not None and value < lowest else f"must be from {lowest} to {most}"
        )
        self(value is None or lowest <= value <= most, subject, rule, value=value)


def text_problems(settings: Any, section: str, may_begin_with_dash: frozenset[str]) -> list[Problem]:
    """Control characters, and a dash at the beginning of what ends up on a command line, in every text of the settings.

    Args:
        settings: dataclasses.
        section: where they hang.
        may_begin_with_dash: full paths of lists of options.
    """
    problems: list[Problem] = []
    for path in fields_of(settings, section):
        value = value_at(settings, path.removeprefix(f"{section}.") if section else path)
        for subject, text in _texts(path, value):
            if found := _CONTROL.search(text):
                rule = f"holds the control character U+{ord(found.group()):04X}"
                problems.append(Problem(ExitCode.CONFIG, subject, rule, "remove it; one line of plain text", text))
            elif text.startswith("-") and path not in may_begin_with_dash:
                rule = "begins with a dash: it would be read as an option"
                problems.append(Problem(ExitCode.CONFIG, subject, rule, "write it without", text))
    return problems


def _texts(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        yield from ((f"{path}[{at}]", text) for at, text in enumerate(cast("list[str]", value)))
    elif isinstance(value, dict):
        for name, text in cast("dict[str, str]", value).items():
            yield f"{path}.{name}", name
            yield f"{path}.{name}", text


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit as schedulers write it; None where it is none.

    ``M``, ``M:SS``, ``H:MM:SS``, ``D-H``, ``D-H:MM``, ``D-H:MM:SS``.
    """
    match = _TIME.fullmatch(time) if time.isascii() and len(time) <= 20 else None
    if match is None:
        return None
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def secret_problems(settings: Any, section: str, environ: Mapping[str, str]) -> list[Problem]:
    """Texts that hold the value of a secret of this environment, as ``${oc.env:WANDB_API_KEY}`` puts it there."""
    mask = SecretMask(environ)
    problems: list[Problem] = []
    for path in fields_of(settings, section):
        value = value_at(settings, path.removeprefix(f"{section}.") if section else path)
        for subject, text in _texts(path, value):
            if mask.text(text) != text:
                rule = "holds a secret of this environment, which would be written into files"
                fix = "list the variable's name under secrets; the run's config can read it: ${oc.env:NAME}"
                problems.append(Problem(ExitCode.CONFIG, subject, rule, fix))
    return problems
