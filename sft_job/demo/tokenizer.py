"""The demo's tokenizer: byte-level BPE trained on the training texts, with a ChatML template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_job.demo.graphs import GraphProblem

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(problems: Sequence[GraphProblem], folder: Path, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Train the tokenizer and save it as a folder that ``AutoTokenizer`` loads.

    Args:
        problems: what to learn the merges from.
        folder: where the tokenizer's files go; made if it is not there.
        vocab_size: largest vocabulary, with the 256 bytes and three special tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The role names are part of every rendered row, so they are learned too.
    bpe.train_from_iterator((f"user\n{row.prompt}\nassistant\n{row.response}" for row in problems), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer
