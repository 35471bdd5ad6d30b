from __future__ import annotations

import io
import re
from itertools import pairwise

from rich.console import Console

from sft_job.data.cache import TokenCache
from sft_job.preview.report import set_report
from sft_job.preview.rows import TrainingStream
from sft_job.preview.terminal import View, show_report, show_rows
from sft_job.preview.text import TokenTexts
from tests.unit.preview.conftest import MakeStream


def written(stream: TrainingStream, texts: TokenTexts, index: int, view: View, **console: object) -> str:
    target = io.StringIO()
    pack, row = stream.pack_of(index, 1)
    show_rows(Console(file=target, width=200, highlight=False, **console), [(pack, [row])], texts, view)  # type: ignore[arg-type]
    return target.getvalue()


def test_marks_stand_around_what_is_trained(stream: MakeStream, texts: TokenTexts, cache: TokenCache) -> None:
    (index,) = cache.find(cache.files[1], 3)
    out = written(stream(), texts, index, View(marks=True))
    assert "‹<|im_start|>›user⏎\n    same‹<|im_end|>›⏎\n    ‹<|im_start|>›assistant⏎\n    ⟦row‹<|im_end|>›⟧\n" in out
    assert re.search(r"odd\.parquet:3   \d+ tokens, \d+ trained, positions 0-\d+, pack \d+-\d+", out)
    assert "more in this pack" in out
    assert "\x1b" not in out


def test_token_boundaries(stream: MakeStream, texts: TokenTexts, cache: TokenCache) -> None:
    (index,) = cache.find(cache.files[1], 3)
    out = written(stream(), texts, index, View(marks=True, boundaries=True))
    pieces = texts.pieces(stream().pack_of(index, 1)[1])
    inside = sum(a.trained == b.trained for a, b in pairwise(pieces))
    legend = 1
    assert out.count("│") == inside + legend


def test_colours_have_a_second_mark(stream: MakeStream, texts: TokenTexts, cache: TokenCache) -> None:
    (index,) = cache.find(cache.files[1], 3)
    out = written(stream(), texts, index, View(marks=False), force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[1;4;[0-9;]+mrow", out) or re.search(r"\x1b\[1;4;[0-9;]+mr", out)
    assert "⟦" not in out


def test_control_characters_of_a_row_never_reach_the_terminal(
    stream: MakeStream, texts: TokenTexts, cache: TokenCache
) -> None:
    for number in range(3):
        (index,) = cache.find(cache.files[1], number)
        out = written(stream(), texts, index, View(marks=True))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\u200b]", out)
    assert "مرحبا بالعالم! 123" in out


def test_long_rows_are_cut_in_the_middle(stream: MakeStream, texts: TokenTexts, cache: TokenCache) -> None:
    (index,) = cache.find(cache.files[1], 5)
    _, row = stream().pack_of(index, 1)
    cut, full = (written(stream(), texts, index, View(marks=True, full=full)) for full in (False, True))
    left_out, trained = re.findall(r"\.\.\. ([\d,]+) tokens left out, ([\d,]+) of them trained", cut)[0]
    assert int(left_out.replace(",", "")) == len(row.input_ids) - 500
    assert int(trained.replace(",", "")) == row.trained_tokens - 250
    assert "left out" not in full
    assert len(full) > len(cut)


def test_report(cache: TokenCache) -> None:
    target = io.StringIO()
    show_report(Console(file=target, width=400, highlight=False), set_report("train", cache))
    out = target.getvalue()
    assert re.search(r"trained on +23 \(100\.0 %\)", out)
    assert "█" in out
    assert "odd.parquet" in out
    assert "truncated" in out.partition("tokens")[0]
    assert "truncated" not in out.rpartition("█")[2]  # a column of zeros is left out
