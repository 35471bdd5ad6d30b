"""Families of chat templates, as test data: their tokens, and what an assistant's turn must look like in each.

What is expected is written down here a second time, in Python and from the families' documented formats, so that the
tests compare two independent accounts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "golden" / "templates"

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A template and its expectations.

    Attributes:
        turn: the trained text of the assistant's turn at an index, given all messages.
        special: special tokens.
        text_tokens: added tokens that are not special.
        bos: the tokenizer's bos token.
        eos: the tokenizer's eos token.
    """

    turn: Callable[[Messages, int], str]
    special: tuple[str, ...]
    text_tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", [])]


def chatml_call(call: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}\n</tool_call>'


def chatml(messages: Messages, index: int) -> str:
    message = messages[index]
    calls = [chatml_call(call) for call in calls_of(message)]
    if not calls:
        return message["content"] + "<|im_end|>"
    return "\n".join([message["content"], *calls] if message["content"] else calls) + "<|im_end|>"


def chatml_generation(messages: Messages, index: int) -> str:
    message = messages[index]
    thoughts = message.get("reasoning_content")
    calls = "".join(f"\n<tool_call>\n{dumps(call)}\n</tool_call>" for call in calls_of(message))
    return (f"<think>\n{thoughts}\n</think>\n\n" if thoughts else "") + message["content"] + calls + "<|im_end|>"


def chatml_no_prompt(messages: Messages, index: int) -> str:
    return messages[index]["content"] + "<|im_end|>"


def qwen3(messages: Messages, index: int) -> str:
    message = messages[index]
    content, thoughts = message["content"], message.get("reasoning_content", "")
    if not thoughts and "</think>" in content:
        thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    questions = [
        n for n, m in enumerate(messages) if m["role"] == "user" and not m["content"].startswith("<tool_response>")
    ]
    shown = content
    if index > (questions[-1] if questions else -1):
        if thoughts:
            shown = "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
        elif index == len(messages) - 1:
            shown = content.lstrip("\n")
    for number, call in enumerate(calls_of(message)):
        shown += ("\n" if content or number else "") + chatml_call(call)
    return shown + "<|im_end|>"


def llama3(messages: Messages, index: int) -> str:
    message = messages[index]
    if calls := calls_of(message):
        return f'{{"name": "{calls[0]["name"]}", "parameters": {dumps(calls[0]["arguments"])}}}<|eot_id|>'
    return message["content"].strip() + "<|eot_id|>"


def mistral(messages: Messages, index: int) -> str:
    message = messages[index]
    if calls := calls_of(message):
        shown = (f'{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}' for call in calls)
        return f"[TOOL_CALLS][{', '.join(shown)}]</s>"
    return " " + message["content"].strip() + "</s>"


def gemma(messages: Messages, index: int) -> str:
    return messages[index]["content"].strip() + "<end_of_turn>"


def phi(messages: Messages, index: int) -> str:
    return messages[index]["content"] + "<|end|>"


def deepseek_r1(messages: Messages, index: int) -> str:
    message = messages[index]
    content = message["content"]
    if calls := calls_of(message):
        shown = (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call['name']}\n```json\n{dumps(call['arguments'])}\n```"
            "<｜tool▁call▁end｜>"
            for call in calls
        )
        content += "<｜tool▁calls▁begin｜>" + "".join(shown) + "<｜tool▁calls▁end｜>"
    else:
        content = content.split("</think>")[-1]
    # The generation prompt behind a question ends with the tag: a model that is asked does not write it.
    asked = index == 0 or messages[index - 1]["role"] != "tool"
    return (content.removeprefix("<think>\n") if asked else content) + "<｜end▁of▁sentence｜>"


def harmony(messages: Messages, index: int) -> str:
    message = messages[index]
    thoughts, content = message.get("reasoning_content", ""), message["content"]
    if calls := calls_of(message):
        answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
        told = (thoughts or content) if index > (answers[-1] if answers else -1) else ""
        first = f"<|channel|>analysis<|message|>{told}<|end|><|start|>assistant" if told else ""
        name, arguments = calls[0]["name"], dumps(calls[0]["arguments"])
        return f"{first} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
    last = index == len(messages) - 1
    first = f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant" if thoughts and last else ""
    return f"{first}<|channel|>final<|message|>{content}" + ("<|return|>" if last else "<|end|>")


def olmo(messages: Messages, index: int) -> str:
    return messages[index]["content"] + "<|endoftext|>"


def command(messages: Messages, index: int) -> str:
    message = messages[index]
    thoughts = message.get("reasoning_content")
    first = f"<|START_THINKING|>{thoughts}<|END_THINKING|>" if thoughts else ""
    return f"{first}<|START_RESPONSE|>{message['content']}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

FAMILIES = {
    "chatml": Family(chatml, _CHATML, _THOUGHTS[2:], eos="<|im_end|>"),
    "chatml_generation": Family(chatml_generation, _CHATML, _THOUGHTS, eos="<|endoftext|>"),
    "chatml_no_prompt": Family(chatml_no_prompt, _CHATML, eos="<|im_end|>"),
    "qwen3": Family(qwen3, _CHATML, (*_THOUGHTS, "<tool_response>", "</tool_response>"), eos="<|im_end|>"),
    "llama3": Family(
        llama3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "mistral": Family(
        mistral,
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        bos="<s>",
        eos="</s>",
    ),
    "gemma": Family(gemma, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>"),
    "phi": Family(
        phi,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"),
        eos="<|endoftext|>",
    ),
    "deepseek_r1": Family(
        deepseek_r1,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        (
            *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>"),
            *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "harmony": Family(
        harmony,
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        bos="<|startoftext|>",
        eos="<|return|>",
    ),
    "olmo": Family(olmo, ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    "command": Family(
        command,
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
}


def family_tokenizer(name: str, *, trim_offsets: bool = False, rstrip: bool = False) -> Any:
    """A byte-level BPE tokenizer that merges blanks and line breaks, with the family's tokens and template.

    Args:
        name: of the family.
        trim_offsets: tokens leave out the blanks that they begin with in their offsets, as Llama's do.
        rstrip: special tokens take the blanks behind them along, as Phi's do.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    text = 'assistant\n\nuser system\n\n\n  the answer is in the city\n\n{"name": "a"}}\n grüße final. \n'
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.text_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return fast
