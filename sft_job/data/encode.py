"""Text becomes token ids, with the run's policy on control tokens that stand in a row's text.

A chat template writes control tokens (``<|im_start|>``) and a row's text between them. A tokenizer cannot tell the two
apart: a control token quoted in a prompt would end the turn in its middle. So, unless a run allows them, control
tokens of a row's text are replaced by placeholders before the template sees it (``protect``), and what a placeholder
stands for is encoded as the plain text that it is (``encode``).

Plain text is encoded where it stands, by a copy of the tokenizer in which the control tokens have other names: their
old text is nothing special to the copy, and what the template wrote is given to it under the new names. The copy is
made when the first row needs it.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft_job.data.control_tokens import MARK, Hider, control_ids, pattern, pieces, restore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]

# Pieces that stand for bytes keep their names: the model looks them up itself.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBE = "probe"
# The library keeps the merges of the first 10,000 words that it meets, for good; texts of a training set have more.
_WORDS_REMEMBERED = 100_000


class Encoder:
    """Encodes texts that a template wrote around protected rows.

    Attributes:
        control_ids: ids of the control tokens by their text: all special tokens, and added tokens that the template
            writes around the messages of a plain conversation. Other added tokens (``<think>``) are text.
        has_offsets: ``encode_with_offsets`` knows where tokens stand; false for tokenizers written in Python.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, allow_control_tokens: bool, chat_template: str | None = None
    ) -> None:
        """Find the control tokens.

        Args:
            tokenizer: it is this encoder's from now on: its padding and truncation are turned off.
            allow_control_tokens: control tokens in a row's text act as control tokens.
            chat_template: Jinja text in place of the tokenizer's own template.
        """
        self._tokenizer: Any = tokenizer
        # The tokenizers library itself, without transformers' padding, masks and warnings around each call.
        self._backend: Any = self._tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            _remember_words(self._backend)
        self.has_offsets = self._backend is not None
        self.control_ids = control_ids(self._tokenizer, chat_template)
        self._hider = Hider(self.control_ids, self._early_normalizer()) if self.control_ids else None
        self._hides = self._hider is not None and not allow_control_tokens
        self._copy: _PlainCopy | None = None
        self._copied = False

    def protect(self, text: str) -> str:
        """A row's text with placeholders for its control tokens; where they are allowed, the text itself."""
        return self._hider.hide(text) if self._hides and self._hider else text

    def protect_all(self, value: Any) -> Any:
        """Protect every text in nested lists and mappings, keys included; other values stay as they are."""
        if not self._hides:
            return value
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, Mapping):
            return {self.protect_all(key): self.protect_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect_all(item) for item in value]
        return value

    def control_tokens_in(self, text: str) -> list[str]:
        """Control tokens that stand in a row's text, protected or not; each once, in the order of their places."""
        return self._hider.found(restore(text)) if self._hider else []

    def encode(self, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
        """Ids of each text; what placeholders stand for becomes plain text.

        Args:
            texts: rendered from protected rows, or protected themselves.
            special_tokens: let the tokenizer add its own frame of special tokens, as it does around a document.
        """
        if not (self._hides and any(MARK in text for text in texts)):
            return self._encode_batch(texts, special_tokens)
        seen = self._encode_batch([text for text in texts if MARK not in text], special_tokens)
        rest = iter(seen)
        return [self._encode_hidden(text, special_tokens)[0] if MARK in text else next(rest) for text in texts]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets | None]]:
        """Ids of each text and where each token stands in it: ``(start, end)`` in characters, end exclusive.

        Characters are those of the given text, placeholders included: every token of what a placeholder stands for
        has the place of the whole placeholder. A token may leave out the blank that it begins with. Offsets are None
        where ``has_offsets`` is false.
        """
        if self._backend is None:
            return [(ids, None) for ids in self.encode(texts)]
        plain = [text for text in texts if not (self._hides and MARK in text)]
        seen = iter(self._backend.encode_batch(plain, add_special_tokens=False)) if plain else iter(())
        found: list[tuple[list[int], Offsets | None]] = []
        for text in texts:
            if self._hides and MARK in text:
                found.append(self._encode_hidden(text, special_tokens=False))
            else:
                item = next(seen)
                found.append((item.ids, item.offsets))
        return found

    def _encode_batch(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return self._tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]

    def _encode_hidden(self, text: str, special_tokens: bool) -> tuple[list[int], Offsets]:
        if not self._copied:
            self._copy, self._copied = _plain_copy(self._backend, self.control_ids), True
        if self._copy is not None:
            return self._copy.encode(text, special_tokens)
        return self._encode_pieces(text, special_tokens)

    def _encode_pieces(self, text: str, special_tokens: bool) -> tuple[list[int], Offsets]:
        """Where no copy can be made: hidden text letter by letter, the text between by itself."""
        ids: list[int] = []
        offsets: Offsets = []
        for piece in pieces(text):
            for part in piece.text if piece.hidden else [piece.text]:
                new = self._encode_batch([part], special_tokens=False)[0]
                ids += new
                offsets += [(piece.start, piece.end)] * len(new)
        if special_tokens:
            framed, bare = (self._encode_batch([_PROBE], special)[0] for special in (True, False))
            places = range(len(framed) - len(bare) + 1)
            before = next((place for place in places if framed[place : place + len(bare)] == bare), 0)
            after = framed[before + len(bare) :]
            ids = [*framed[:before], *ids, *after]
            offsets = [(0, 0)] * before + offsets + [(0, 0)] * len(after)
        return ids, offsets

    def _early_normalizer(self) -> Any:
        """The backend's normalizer, where it works on text before control tokens are looked for."""
        added = self._tokenizer.added_tokens_decoder.values()
        late = any(token.normalized and token.content in self.control_ids for token in added)
        return self._backend.normalizer if late and self._backend is not None else None


class _PlainCopy:
    """A copy of a tokenizer whose control tokens have names that no text holds."""

    def __init__(self, backend: Any, names: Mapping[str, str]) -> None:
        self._backend = backend
        self._names = names
        self._tokens = pattern(names)

    def encode(self, text: str, special_tokens: bool) -> tuple[list[int], Offsets]:
        """Ids, and places in the given text."""
        parts: list[str] = []
        places = _Places()
        for piece in pieces(text):
            if piece.hidden:
                parts.append(places.put(piece.start, piece.end, piece.text))
                continue
            last = 0
            for match in self._tokens.finditer(piece.text):
                parts.append(places.copy(piece.text[last : match.start()]))
                start = piece.start + match.start()
                parts.append(places.put(start, start + len(match[0]), self._names[match[0]]))
                last = match.end()
            parts.append(places.copy(piece.text[last:]))
        encoded = self._backend.encode("".join(parts), add_special_tokens=special_tokens)
        return encoded.ids, [places.back(*offset) for offset in encoded.offsets]


class _Places:
    """Where the characters of a changed text stood before some stretches were replaced."""

    def __init__(self) -> None:
        self._changed = 0
        self._stretches: list[tuple[int, int, int, int]] = []
        """Start and end in the given text, start and end in the changed one."""

    def copy(self, text: str) -> str:
        """Go on with text that stays as it is."""
        self._changed += len(text)
        return text

    def put(self, start: int, end: int, text: str) -> str:
        """Go on with text in place of a stretch of the given one."""
        self._stretches.append((start, end, self._changed, self._changed + len(text)))
        self._changed += len(text)
        return text

    def back(self, start: int, end: int) -> tuple[int, int]:
        """The place in the given text of a place in the changed one; a part of a stretch has the whole one's."""
        return self._back(start, is_end=False), self._back(end, is_end=True)

    def _back(self, place: int, is_end: bool) -> int:
        find = bisect_left if is_end else bisect_right
        index = find(self._stretches, place, key=lambda stretch: stretch[2]) - 1
        if index < 0:
            return place
        given_start, given_end, _, changed_end = self._stretches[index]
        if is_end:
            return given_end + max(0, place - changed_end)
        return given_start if place < changed_end else given_end + place - changed_end


def _plain_copy(backend: Any, tokens: Mapping[str, int]) -> _PlainCopy | None:
    """The copy; None for a tokenizer that cannot be copied, because parts of it are written in Python."""
    if backend is None:
        return None
    try:
        settings: dict[str, Any] = json.loads(backend.to_str())
    except Exception:  # the library has one exception for all that it cannot write
        return None
    # Nobody can have written a name that is made now.
    nonce = secrets.token_hex(8)
    names = {token: f"q{nonce}x{number}q" for number, token in enumerate(tokens) if not _BYTE.fullmatch(token)}
    for token in settings["added_tokens"]:
        token["single_word"] &= token["content"] not in names
        token["content"] = names.get(token["content"], token["content"])
    _rename(settings["model"], names, {token["content"]: token["id"] for token in settings["added_tokens"]})
    # Imported with transformers in any case, and takes its time.
    from tokenizers import Tokenizer  # noqa: PLC0415

    return _PlainCopy(Tokenizer.from_str(json.dumps(settings)), names)


def _rename(model: dict[str, Any], names: Mapping[str, str], added: Mapping[str, int]) -> None:
    """Rename tokens in the vocabulary, and write all added ones into it, so that each keeps its id."""
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], list):  # Unigram: [piece, score] at the place of its id
        scores = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        inverse = {number: token for token, number in added.items()}
        for number in range(len(scores), max(inverse, default=-1) + 1):
            scores.append([inverse.get(number, f"{next(iter(names.values()), '')}gap{number}"), 0.0])
        model["vocab"] = scores
        return
    model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()} | dict(added)
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        glue = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right] for left, right in pairs if not {left, right, left + right.removeprefix(glue)} & names.keys()
        ]


def _remember_words(backend: Any) -> None:
    """Make room for more words in a BPE model's cache: about a tenth faster, some 20 MB, the same ids."""
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(_WORDS_REMEMBERED)
