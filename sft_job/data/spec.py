"""What a token cache is made from, and what identifies it. Free of torch and transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_job.config.schema import JobConfig
from sft_job.config.sets import DataSet, Split, data_sets
from sft_job.contract import ExitCode
from sft_job.data.columns import Column, message_columns, plain, text_columns
from sft_job.data.conversation import VERSION as CONVERSATION_VERSION
from sft_job.data.custom import CustomClass, custom_class
from sft_job.data.files import resolve_files
from sft_job.data.render import fingerprint as renderer_fingerprint
from sft_job.data.tokenizer import folder_problem, template_text
from sft_job.errors import Problem, ProblemsError

# hashlib lets go of the interpreter's lock, and a network file system answers many readers faster than one.
_THREADS = 16


@dataclass(frozen=True)
class CacheSpec:
    """Everything that the tokens of one split depend on.

    Attributes:
        split: ``train`` or ``val``.
        files: parquet files, in the order of their rows.
        prompt: columns of the prompt.
        response: columns of the response.
        messages: columns of messages, tools and thinking, which are read instead; empty = prompts and responses.
        train_on: the assistant's turns that are trained: ``all`` or ``last``.
        tokenizer: folder of the tokenizer.
        max_length: longest row in tokens.
        truncation: ``error``, ``left`` or ``right``.
        max_samples: the first rows over all files; -1 = all.
        chat_template: text of a template that takes the place of the tokenizer's; None = the tokenizer's.
        template_kwargs: extra variables for the template.
        trust_remote_code: run Python code that the tokenizer's folder brings.
        allow_control_tokens: control tokens in a row's text act as control tokens.
        custom: the user's class that reads the files and makes tokens of them; None = the job's own way.
        copies: copies of the files, in the same order, which are read in their place; messages name the files.
        source: the named data set that this is; None where sets have no names. Names and shares make no other tokens.
    """

    split: Split
    files: tuple[Path, ...]
    prompt: tuple[Column, ...]
    response: tuple[Column, ...]
    tokenizer: Path
    max_length: int
    truncation: str
    max_samples: int = -1
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    allow_control_tokens: bool = False
    messages: tuple[Column, ...] = ()
    train_on: str = "all"
    custom: CustomClass | None = None
    copies: tuple[Path, ...] = ()
    source: DataSet | None = None

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files to read."""
        return self.copies or self.files

    @property
    def origins(self) -> tuple[Path, ...]:
        """What rows are counted by and named after: the files, or the file of the user's class."""
        return (self.custom.path,) if self.custom else self.files

    @property
    def files_option(self) -> str:
        """The option that names the files."""
        return self.source.option if self.source else f"data.{self.split}_files"

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns of text that are read; a class of the user's own reads what it likes."""
        if self.custom:
            return ()
        return self.messages or (*self.prompt, *self.response)

    def fingerprint(self) -> str:
        """SHA-256 over the files' contents (not their paths or times), the tokenizer, the template and the options.

        Reads every file once, in several threads.

        Raises:
            ProblemsError: exit 65, where a file cannot be read; 2 for the file of the user's class.
        """
        parts: dict[str, Any] = {
            "split": self.split,
            "files": self._content_hashes(),
            "prompt": [asdict(column) for column in self.prompt],
            "response": [asdict(column) for column in self.response],
            "max_samples": max(self.max_samples, -1),
            "max_length": self.max_length,
            "truncation": self.truncation,
            "allow_control_tokens": self.allow_control_tokens,
            "renderer": renderer_fingerprint(
                self.tokenizer, self.chat_template, self.template_kwargs, self.trust_remote_code
            ),
        }
        if self.messages:
            parts["messages"] = [asdict(column) for column in self.messages]
            parts["train_on"] = self.train_on
            parts["messages_version"] = CONVERSATION_VERSION
        if self.custom:
            parts["custom"] = self.custom.fingerprint()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _content_hashes(self) -> list[str]:
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(_content_hash, self.sources))
        problems = [
            Problem(ExitCode.DATA, f"{self.files_option}: {file}", f"cannot be read: {error.strerror}")
            for file, error in zip(self.files, hashes, strict=True)
            if isinstance(error, OSError)
        ]
        if problems:
            raise ProblemsError(problems)
        return [str(digest) for digest in hashes]


def _content_hash(file: Path) -> str | OSError:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return error


def cache_specs(config: JobConfig, split: Split) -> list[CacheSpec]:
    """The specs of a split's data sets, by name; one without a source where they have no names; none without files.

    Raises:
        ProblemsError: everything that is wrong with any of them, as ``cache_spec`` says.
    """
    specs: list[CacheSpec] = []
    problems: list[Problem] = []
    for each in data_sets(config.data, split):
        try:
            spec = cache_spec(replace(config, data=each.data), split, each.option)
        except ProblemsError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        else:
            specs += [replace(spec, source=each) if each.name else spec] if spec else []
    if problems:
        raise ProblemsError(problems)
    return specs


def cache_spec(config: JobConfig, split: Split, option: str | None = None) -> CacheSpec | None:
    """The spec that a config without named sets asks for; None where it has no validation files.

    Args:
        config: the run's settings.
        split: which files.
        option: what names the files in messages; None = the option itself.

    Raises:
        ProblemsError: everything that is wrong with the files' paths, the tokenizer's folder, the template's path and
            the file of the user's class.
    """
    data = config.data
    value = data.train_files if split == "train" else data.val_files
    if value is None and split == "val":
        return None
    files, problems = resolve_files(value, option or f"data.{split}_files")
    folder = Path(config.model.partial_pretrain).expanduser() if config.model.partial_pretrain else None
    if problem := folder_problem(folder):
        problems.append(problem)
    custom = None
    try:
        custom = custom_class(data)
    except ProblemsError as error:
        problems += error.problems
    template = None
    try:
        template = template_text(data.chat_template)
    except ProblemsError as error:
        problems += error.problems
    if problems or folder is None:
        raise ProblemsError(problems)
    prompt, response = text_columns(data)
    return CacheSpec(
        split=split,
        files=tuple(files),
        prompt=prompt,
        response=response,
        tokenizer=folder,
        max_length=data.max_length,
        truncation=data.truncation,
        max_samples=data.train_max_samples if split == "train" else data.val_max_samples,
        chat_template=template,
        template_kwargs=plain(data.apply_chat_template_kwargs) or {},
        trust_remote_code=config.model.trust_remote_code,
        allow_control_tokens=data.allow_control_tokens,
        messages=() if custom else message_columns(data),
        train_on=data.multiturn.train_on,
        custom=custom,
    )
