from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft_job.data.cache import CacheSpec, open_or_build
from sft_job.data.control_tokens import MARK, placeholder, restore
from sft_job.data.encode import Encoder
from tests.unit.data.conftest import write

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXT = "the graph node of <|im_ end path |> /s user assistant"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}"
)


@cache
def backend_json(kind: str) -> str:
    """A trained tokenizer with control tokens in and behind its vocabulary, with a gap in the ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    options: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)]
        trainer: Any = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", initial_alphabet=alphabet, **options)
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **options)
    if kind == "lowercase":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.train_from_iterator([TEXT] * 30, trainer)
    tokenizer.add_tokens(["<think>", "<|role|>"])
    tokenizer.add_special_tokens([AddedToken("<|extra|>", special=True, normalized=kind == "lowercase")])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    settings = json.loads(tokenizer.to_str())
    if kind in ("bytes", "lowercase"):  # merges that end in a control token, as converted SentencePiece models have
        settings["model"]["vocab"]["s>"] = len(settings["model"]["vocab"]) + 20
        settings["model"]["merges"] += [["s", ">"], ["<", "s>"]]
    return json.dumps(settings)


def tokenizer(kind: str, **more: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(backend_json(kind))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", **more)
    fast.chat_template = TEMPLATE
    return fast


@cache
def encoder(kind: str, allow: bool = False) -> Encoder:
    return Encoder(tokenizer(kind), allow_control_tokens=allow)


KINDS = ("bytes", "lowercase", "unigram", "words")
ROW = st.lists(
    st.sampled_from(
        [*SPECIAL, "<|extra|>", "<|EXTRA|>", "＜|extra|＞", "<|ext", "ra|>", "<think>", "<", " ", "a", MARK]
    )
    | st.text(max_size=3),
    max_size=6,
).map("".join)


def controls(subject: Encoder, ids: list[int]) -> list[int]:
    """Control ids, without the one that also stands for unknown text."""
    known = set(subject.control_ids.values()) - {subject.control_ids["<unk>"]}
    return [number for number in ids if number in known]


@pytest.mark.parametrize("kind", KINDS)
@given(user=ROW, second=ROW)
@example(user="<|ext", second="ra|>")
@example(user="<", second="s>")
@example(user="<|ext\t", second="ra|>")
@example(user="\x00<s>\ud7ff", second=placeholder("<s>"))
def test_a_rows_text_adds_no_control_id(kind: str, user: str, second: str) -> None:
    """Also where a template strips two texts and joins them."""
    subject = encoder(kind)
    told = subject.protect(user).strip() + subject.protect(second).strip()
    text = f"<|im_start|>user {told}<|im_end|>"
    ((ids, offsets),) = subject.encode_with_offsets([text])
    assert subject.encode([text, "a", text]) == [ids, subject.encode(["a"])[0], ids]
    assert controls(subject, ids) == [subject.control_ids["<|im_start|>"], subject.control_ids["<|im_end|>"]]
    # Space beside a control token may be hidden with it, where a normalizer would join the two.
    assert "".join(restore(told).split()) == "".join((user + second).split())
    assert offsets is not None
    assert (ids[0], offsets[0]) == (subject.control_ids["<|im_start|>"], (0, 12))
    assert (ids[-1], offsets[-1]) == (subject.control_ids["<|im_end|>"], (len(text) - 10, len(text)))
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


@given(text=ROW)
def test_ids_of_a_byte_level_tokenizer_decode_to_the_text(text: str) -> None:
    subject = encoder("bytes")
    protected = subject.protect(text)
    (ids,) = subject.encode([protected])
    assert tokenizer("bytes").decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert controls(subject, ids) == []
    assert subject.control_tokens_in(protected) == subject.control_tokens_in(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_gives_the_tokenizers_ids(kind: str) -> None:
    """Whatever stands around a placeholder has the ids and the places that it has without one."""
    subject, plain = encoder(kind), tokenizer(kind)
    before = "<|im_start|>user the graph<think> of</s><|role|> a<|extra|> <|endoftext|>"
    ids, offsets = subject.encode_with_offsets([before + placeholder("node") + "<|im_end|> the path<s>"])[0]
    reference = plain(before + "node<|im_end|> the path<s>", add_special_tokens=False, return_offsets_mapping=True)
    assert ids == reference["input_ids"]
    hidden = len(placeholder("node")) - len("node")
    start = len(before)
    expected = [
        (min(a, start) if a < start + 4 else a + hidden, b if b <= start else max(b, start + 4) + hidden)
        for a, b in reference["offset_mapping"]
    ]
    assert offsets == expected
    framed = subject.encode([placeholder("the") + " node"], special_tokens=True)
    assert framed == [plain("the node")["input_ids"]]
    assert framed[0][0] == subject.control_ids["<s>"]


def test_what_is_a_control_token() -> None:
    subject = encoder("bytes")
    assert set(subject.control_ids) == {*SPECIAL, "<|extra|>"}
    written = Encoder(tokenizer("bytes"), allow_control_tokens=False, chat_template="<|role|>" + TEMPLATE)
    assert set(written.control_ids) == {*SPECIAL, "<|extra|>", "<|role|>"}
    failing = Encoder(tokenizer("bytes"), allow_control_tokens=False, chat_template="<|role|>{{ raise_exception('') }}")
    assert set(failing.control_ids) == {*SPECIAL, "<|extra|>", "<|role|>"}
    one = Encoder(tokenizer("bytes", pad_token="!"), allow_control_tokens=False)
    assert one.protect("a!") == "a!"


def test_without_control_tokens_text_passes_untouched() -> None:
    subject = encoder("bytes")
    for text in ("", "a plain text", "1 < 2 and <think>so</think>", "<html>"):
        assert subject.protect(text) is text
    assert subject.encode([]) == []
    assert subject.encode_with_offsets([]) == []


def test_allowed_control_tokens_keep_their_meaning() -> None:
    subject = encoder("bytes", allow=True)
    text = "a<|im_end|>" + placeholder("b")
    assert subject.protect(text) is text
    assert subject.protect_all([text]) == [text]
    assert controls(subject, subject.encode([text])[0]) == [subject.control_ids["<|im_end|>"]]
    assert subject.encode_with_offsets([text])[0][0] == subject.encode([text])[0]


def test_nested_values() -> None:
    subject = encoder("bytes")
    value = {"a": ["<s>", 1, None, {"</s>": ("x", True)}]}
    hidden = {"a": [placeholder("<s>"), 1, None, {placeholder("</s>"): ["x", True]}]}
    assert subject.protect_all(value) == hidden
    assert subject.control_tokens_in("a </s> b <s> </s>") == ["</s>", "<s>"]


def test_tokenizers_that_cannot_be_copied_encode_letter_by_letter() -> None:
    slow = tokenizer("bytes")

    class Slow(type(slow)):  # type: ignore[misc]
        is_fast = False

    slow.__class__ = Slow
    subject = Encoder(slow, allow_control_tokens=False)
    assert not subject.has_offsets
    text = "<|im_start|>the " + subject.protect("<|im_end|>") + " node<|im_end|>"
    (ids,) = subject.encode([text])
    assert controls(subject, ids) == [subject.control_ids["<|im_start|>"], subject.control_ids["<|im_end|>"]]
    assert slow.decode(ids, skip_special_tokens=False) == restore(text)
    assert subject.encode_with_offsets([text]) == [(ids, None)]
    framed = subject.encode([subject.protect("a</s>b")], special_tokens=True)[0]
    assert framed == [4, *subject.encode([subject.protect("a</s>b")])[0], 5]


def test_rows_with_control_tokens_are_counted_and_named(spec: Callable[..., CacheSpec], tmp_path: Any) -> None:
    prompts = ["a", "what does <|im_end|> mean?", "b"]
    file = write(tmp_path / "a.parquet", prompt=prompts, response=["<|eot_id|>", "x", "1 < 2"])
    plain = open_or_build(spec(file), tmp_path / "cache", 1)
    assert plain.report["rows_with_control_tokens"] == 2
    assert plain.report["warnings"] == [
        "data.train_files: 2 rows hold control tokens such as <|eot_id|> as text; they are read as plain text "
        "(data.allow_control_tokens=true gives them their meaning)"
    ]
    end = 2
    assert list(plain.row(1).ids).count(end) == 2
    allowed = open_or_build(spec(file, allow_control_tokens=True), tmp_path / "cache", 1)
    assert allowed.report["warnings"] == []
    assert list(allowed.row(1).ids).count(end) == 3
    assert plain.row(2).ids.tolist() == allowed.row(2).ids.tolist()
