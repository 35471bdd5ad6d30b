"""The model folder's tokenizer: which files it is made of, what identifies it, how it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_job.config.references import names_template_file
from sft_job.config.source import named_bytes
from sft_job.contract import ExitCode
from sft_job.errors import Problem, ProblemsError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPTION = "model.partial_pretrain"
_VOCABULARY = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "tokenization_*.py")
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
# What AutoTokenizer reads of the model's config where the tokenizer's own settings leave it open.
_MODEL_KEYS = ("model_type", "tokenizer_class", "auto_map")


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the folder that make the tokenizer what it is, sorted; the model's ``config.json`` is not among them."""
    found = {path for pattern in (*_VOCABULARY, *_SETTINGS) for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the content of the tokenizer's files, hexadecimal."""
    digest = hashlib.sha256()
    for path in tokenizer_files(folder):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    config = folder / "config.json"
    if config.is_file():
        digest.update(json.dumps(_model_settings(config), sort_keys=True).encode())
    return digest.hexdigest()


def vocabulary_size(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that the model has embeddings for, as far as its config says; at least those of the tokenizer."""
    try:
        settings: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    parts = [settings, settings.get("text_config")] if isinstance(settings, dict) else []
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, dict)]
    return max([len(tokenizer), *(size for size in sizes if isinstance(size, int))])


def _model_settings(config: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads(config.read_bytes())
    except ValueError:  # damaged: whoever loads the model says so
        return {}
    return {key: settings.get(key) for key in _MODEL_KEYS} if isinstance(settings, dict) else {}


def folder_problem(folder: Path | None) -> Problem | None:
    """Why this cannot be a model folder with a tokenizer, by the names of its files."""
    if folder is None:
        return Problem(
            ExitCode.MODEL, _OPTION, "must name the model's folder, which also holds its tokenizer", value=None
        )
    shown = str(folder)
    if not folder.exists():
        parent = next(parent for parent in folder.absolute().parents if parent.is_dir())
        rule = f"does not exist; the nearest existing folder is {parent}"
        return Problem(
            ExitCode.MODEL, _OPTION, rule, "copy the model's folder here first; hub names are not fetched", shown
        )
    if not folder.is_dir():
        return Problem(ExitCode.MODEL, _OPTION, "is not a folder", value=shown)
    if not any(path for pattern in _VOCABULARY for path in folder.glob(pattern)):
        rule = f"holds no tokenizer: none of {', '.join(_VOCABULARY)}"
        return Problem(ExitCode.MODEL, _OPTION, rule, "copy the tokenizer's files beside the model's", shown)
    return None


def load_tokenizer(path: str | Path | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, through transformers' AutoTokenizer; never from the network.

    Raises:
        ProblemsError: exit 66, where the folder or its tokenizer is missing or cannot be loaded.
    """
    folder = Path(path).expanduser() if path is not None else None
    problem = folder_problem(folder)
    if problem:
        raise ProblemsError([problem])
    from transformers import AutoTokenizer  # noqa: PLC0415  takes seconds, and imports torch

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a damaged folder fails in any part of transformers, tokenizers or its own code
        text = shorten(" ".join(str(error).split()), 300) or type(error).__name__
        fix = ""
        if not trust_remote_code and "trust_remote_code" in text:
            fix = "model.trust_remote_code=true, if you trust the Python code in this folder"
        rule = f"the tokenizer cannot be loaded: {text}"
        raise ProblemsError([Problem(ExitCode.MODEL, _OPTION, rule, fix, str(folder))]) from error


def template_text(value: str | None) -> str | None:
    """The text of ``data.chat_template``: the option itself, or the content of the file that it names.

    Raises:
        ProblemsError: exit 2, where it is neither a template nor a file that is there.
    """
    if value is None or not names_template_file(value):
        return value
    path = Path(value).expanduser()
    try:
        return named_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"is neither a Jinja template nor a file that can be read: {error}"
        raise ProblemsError([Problem(ExitCode.CONFIG, "data.chat_template", rule, value=value)]) from error


def renderer_fingerprint(
    folder: Path, template: str | None, template_kwargs: Mapping[str, Any], trust_remote_code: bool, version: int
) -> str:
    """What a rendering depends on besides the row: SHA-256 over tokenizer files, template, its variables, version."""
    parts = {
        "tokenizer": tokenizer_digest(folder),
        "template": template,
        "template_kwargs": dict(template_kwargs),
        "trust_remote_code": trust_remote_code,
        "version": version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
