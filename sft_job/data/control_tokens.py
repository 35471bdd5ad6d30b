"""Control tokens that stand in a row's text: which tokens are control tokens, and how text hides them from a template.

A placeholder is ``_MARK``, the hidden text's UTF-8 in hexadecimal, ``_END``. Nothing has to be remembered to undo it,
and lower-case letters and digits pass unchanged through what templates do to text (trim, split, tojson, lower).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MARK = "q0plaintext0q"
_END = "q"
_PLACEHOLDER = re.compile(f"{MARK}((?:[0-9a-f]{{2}})+){_END}")
# Added tokens around thoughts and tool calls belong to what a response says, whoever writes them.
_CONTENT = re.compile(r"think|thought|reason|tool|function", re.IGNORECASE)
_ASCII = "".join(map(chr, range(128)))
_CONVERSATION = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "content": "probe"},
    {"role": "user", "content": "probe"},
]


def placeholder(text: str) -> str:
    """What stands for a text until it is encoded."""
    return f"{MARK}{text.encode('utf-8', 'surrogatepass').hex()}{_END}"


def _hidden(match: re.Match[str]) -> str:
    return bytes.fromhex(match[1]).decode("utf-8", "surrogatepass")


def restore(text: str) -> str:
    """The text with what its placeholders stand for."""
    return _PLACEHOLDER.sub(_hidden, text) if MARK in text else text


class Piece(NamedTuple):
    """A stretch of a text with placeholders.

    Attributes:
        start: of the stretch in the text.
        end: exclusive.
        text: what it stands for.
        hidden: it is a placeholder.
    """

    start: int
    end: int
    text: str
    hidden: bool


def pieces(text: str) -> Iterator[Piece]:
    """The stretches of a text, in order, without empty ones."""
    place = 0
    for match in _PLACEHOLDER.finditer(text):
        if match.start() > place:
            yield Piece(place, match.start(), text[place : match.start()], False)
        yield Piece(match.start(), match.end(), _hidden(match), True)
        place = match.end()
    if place < len(text):
        yield Piece(place, len(text), text[place:], False)


def control_ids(tokenizer: Any, chat_template: str | None) -> dict[str, int]:
    """Ids of the control tokens by their text.

    They are the special tokens, and added tokens that the template writes around the messages of a plain
    conversation, as some models' role tokens are; not the marks of thoughts and tool calls, which responses write.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: Jinja text in place of the tokenizer's own.
    """
    added = tokenizer.added_tokens_decoder
    found = {token.content: number for number, token in added.items() if token.special}
    found.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    others = {
        token.content: number
        for number, token in added.items()
        if token.content not in found and not _CONTENT.search(token.content)
    }
    if others and (chat_template or tokenizer.chat_template):
        shown = _shown(tokenizer, chat_template)
        found.update((token, number) for token, number in others.items() if token in shown)
    # A token of one character, as some models use for padding, cannot be told from text.
    return {token: number for token, number in found.items() if len(token.strip()) > 1}


def _shown(tokenizer: Any, chat_template: str | None) -> str:
    """What the template writes for a plain conversation; where it fails on one, the template itself."""
    try:
        return tokenizer.apply_chat_template(
            _CONVERSATION, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program of its own: it may fail with anything
        return str(chat_template or tokenizer.chat_template)


def pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the words at a place; built as a tree of their letters, so that many cost little."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_branches(tree))


def _branches(node: dict[str, Any]) -> str:
    texts = [re.escape(letter) + _branches(child) for letter, child in sorted(node.items()) if letter]
    if len(texts) == 1 and "" not in node:
        return texts[0]
    return f"(?:{'|'.join(texts)}){'?' if '' in node else ''}" if texts else ""


class Hider:
    """Replaces control tokens in rows' texts by placeholders."""

    def __init__(self, tokens: Iterable[str], normalizer: Any = None) -> None:
        """Prepare the search.

        Args:
            tokens: the control tokens.
            normalizer: of the tokenizers library, where it works on text before control tokens are looked for in it.
        """
        tokens = list(tokens)
        self._tokens = pattern(tokens)
        # A text that holds the mark by chance hides it too, so that nothing reads it as a placeholder.
        self._hides = pattern([*tokens, MARK])
        self._firsts = tuple({token[0] for token in tokens})
        self._heads = {token[:length] for token in tokens for length in range(1, len(token))}
        self._longest = max(map(len, tokens))
        self._normalize = normalizer.normalize_str if normalizer is not None else None
        self._ascii_changes = self._normalize is not None and self._normalize(_ASCII) != _ASCII

    def hide(self, text: str) -> str:
        """The text with placeholders; the same object where there is nothing to hide."""
        made = self._normalize is not None and self._made_by_normalizing(text)
        if not made and MARK not in text and not any(first in text for first in self._firsts):
            return text
        hidden = self._hides.sub(lambda match: placeholder(match[0]), text)
        if made:
            # Any of these may have been changed into a part of a token; a placeholder holds none of them.
            changed = (c for c in dict.fromkeys(text) if not c.isascii() or c.isupper() or c < "\t")
            hidden = hidden.translate({ord(c): placeholder(c) for c in changed})
        return self._hide_head(hidden)

    def found(self, text: str) -> list[str]:
        """Control tokens in the text, each once, in the order of their first places."""
        return list(dict.fromkeys(self._tokens.findall(text)))

    def _hide_head(self, text: str) -> str:
        """Hide the beginning of a control token at the text's end: a template may join it to the next text's."""
        body = text.rstrip()
        for place in range(max(0, len(body) - self._longest), len(body)):
            if body[place] in self._firsts and body[place:] in self._heads:
                return body[:place] + placeholder(body[place:]) + text[len(body) :]
        return text

    def _made_by_normalizing(self, text: str) -> bool:
        """The tokenizer's normalizer makes control tokens of other characters."""
        if self._normalize is None or (text.isascii() and not self._ascii_changes):
            return False
        return len(self._tokens.findall(self._normalize(text))) > len(self._tokens.findall(text))
