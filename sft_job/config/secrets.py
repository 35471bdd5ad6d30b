"""Secrets of the environment: found by the names of their variables, hidden wherever text leaves the process.

A setting may use a variable (``${oc.env:NAME}``), and a library may put any value into an error. So the value is
hidden, wherever it came from: in what is shown, logged, reported, and stored with a checkpoint. A hidden value stands
as ``<secret NAME>``, so that two starts with different keys have equal settings: a key never decides what is computed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

_NAME = re.compile(
    r"(^|_)(KEYS?|PASS|PASSPHRASE|CREDENTIALS?|PAT|WEBHOOK|CONN(ECTION)?_?STR(ING)?|DSN|AUTHORIZATION)(_|\d|$)"
    # Words that say it wherever they end: PGPASSWORD, ACCESSTOKEN.
    r"|(PASSWORDS?|PASSWD|TOKENS?|SECRETS?|(API|ACCESS|SECRET|PRIVATE)_?KEYS?|(SSH|SUDO|DB)PASS)(_|\d|$)"
    # Words that mean other things elsewhere: the shell's own PWD, AUTH_TYPE.
    r"|_PWD$|(^|_)(AUTH|SAS)$",
    re.IGNORECASE,
)
# These say where a secret lies, not what it is.
_PLACE = re.compile(r"_(FILE|PATH|DIR|FOLDER|SOCK|NAME|MODE)$", re.IGNORECASE)
_SHORTEST = 8
"""A shorter value is a word that may stand anywhere: hiding it would make everything unreadable and protect nothing."""
# Values that say themselves what they are, where they stand: keys of well-known services, passwords in addresses.
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|xox[abprs]-[\w-]{20,}"
    r"|A(?:KIA|SIA)[A-Z0-9]{16}|glpat-[\w-]{20,}|AIza[\w-]{35})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
CUT = "…"
"""Stands where a long value was cut; what is left of a secret before it is hidden, too."""
_SHORTEST_CUT = 4
_CUT_FORMS = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[abprs]-|A(?:KIA|SIA)|glpat-|AIza)[\w-]*(?=…)"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=…)"
)


class SecretMask:
    """Hides the secrets of one environment in text.

    Args:
        environ: environment variables.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        found = {value: name for name, value in sorted(environ.items(), reverse=True) if _is_secret(name, value)}
        self._names = {form: name for value, name in found.items() for form in _forms_of(value)}
        # The longest first: one secret may begin with another.
        choices = sorted(self._names, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, choices))) if choices else None

    def text(self, text: str) -> str:
        """The text with every secret in it replaced by ``<secret NAME>``, or ``<secret>`` where only its form tells."""
        if self._values is not None:
            text = self._values.sub(lambda match: f"<secret {self._names[match.group()]}>", text)
        text = _FORMS.sub("<secret>", text)
        return self._without_cut(text) if CUT in text else text

    def _without_cut(self, text: str) -> str:
        """The text without beginnings of secrets at places where it was cut."""
        *parts, last = text.split(CUT)
        for place, part in enumerate(parts):
            for value, name in self._names.items():
                begun = _begun(part, value)
                if begun:
                    part = f"{part[:-begun]}<secret {name}>"
            parts[place] = part
        return _CUT_FORMS.sub("<secret>", CUT.join([*parts, last]))

    def tree(self, value: Any) -> Any:
        """The same for every text in nested lists and dictionaries."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.tree(key): self.tree(each) for key, each in cast("dict[Any, Any]", value).items()}
        if isinstance(value, list | tuple):
            return [self.tree(each) for each in cast("list[Any]", value)]
        return value


def _begun(part: str, value: str) -> int:
    """How many characters of a secret stand at the end of a text that was cut there; 0 where it is none."""
    tail = part[-len(value) :]
    start = tail.find(value[:_SHORTEST_CUT])
    while start >= 0:
        if value.startswith(tail[start:]):
            return len(tail) - start
        start = tail.find(value[:_SHORTEST_CUT], start + 1)
    return 0


def _is_secret(name: str, value: str) -> bool:
    return len(value) >= _SHORTEST and _NAME.search(name) is not None and _PLACE.search(name) is None


def _forms_of(value: str) -> set[str]:
    """A value as it is, and as Python and JSON write it in quotes."""
    stripped = value.strip()
    return {value, repr(value)[1:-1], value.encode("unicode_escape").decode()} | (
        {stripped} if len(stripped) >= _SHORTEST else set[str]()
    )


class _MaskedStream:
    """A text stream that hides secrets in what is written; everything else is the stream's own.

    Args:
        stream: where it is written.
        mask: hides the secrets.
        ignored: errors of writing that nobody is told of.
    """

    def __init__(self, stream: TextIO, mask: SecretMask, ignored: tuple[type[Exception], ...] = ()) -> None:
        self._stream = stream
        self._mask = mask
        self._ignored = ignored

    def write(self, text: str) -> int:
        with contextlib.suppress(*self._ignored):
            self._stream.write(self._mask.text(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self._ignored):
            self._stream.flush()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def secrets_hidden(environ: Mapping[str, str]) -> Generator[SecretMask]:
    """Hide secrets in all that Python writes to standard output and error while the block lasts.

    What is written piece by piece is looked at piece by piece: log records, tracebacks' lines and messages come whole.
    """
    mask = SecretMask(environ)
    with contextlib.ExitStack() as stack:
        # A stream that was closed when the process began is None.
        given = [stream or stack.enter_context(Path(os.devnull).open("w")) for stream in (sys.stdout, sys.stderr)]
        # What standard error cannot take (its disk is full, its reader is gone) must not become another exit code.
        out, err = _MaskedStream(given[0], mask), _MaskedStream(given[1], mask, (OSError, ValueError))
        stack.enter_context(contextlib.redirect_stdout(cast("TextIO", out)))
        stack.enter_context(contextlib.redirect_stderr(cast("TextIO", err)))
        yield mask
