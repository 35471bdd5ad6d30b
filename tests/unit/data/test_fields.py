from __future__ import annotations

import pytest

from sft_job.data.fields import Field, align, mark, masked, tags_before


def fields(*texts: str) -> list[Field]:
    return [Field(number, "content", text) for number, text in enumerate(texts)]


def test_fields_are_found_with_what_stands_between() -> None:
    places = align("<a>x y</a><b>\n{}", f"<a>{mark(0)}</a><b>{mark(1)}", fields(" x y ", "\n{}"))
    assert places is not None
    assert [(place.start, place.end, place.before, place.after) for place in places] == [
        (3, 6, "<a>", "</a><b>"),
        (13, 16, "</a><b>", ""),
    ]
    assert [place.previous for place in places] == [None, 0]


@pytest.mark.parametrize("text", ['say "no"\n', "ž\t"])
def test_texts_in_json_are_found(text: str) -> None:
    import json

    for ascii_only in (False, True):
        assert align(json.dumps([text], ensure_ascii=ascii_only), f'["{mark(0)}"]', fields(text))


@pytest.mark.parametrize(
    ("rendering", "with_marks"),
    [
        ("<a>x</a>", f"<b>{mark(0)}</a>"),  # another beginning
        ("<a>x</b>", f"<a>{mark(0)}</a>"),  # another end
        ("<a>x</a>!", f"<a>{mark(0)}</a>"),  # an end that depends on the text
        ("<a>X</a>", f"<a>{mark(0)}</a>"),  # a text that was rewritten
        ("<a>x</a>x", f"<a>{mark(0)}</a>"),  # a text that is shown once more in another way
        (f"<a>x</a>{mark(3)}", f"<a>{mark(0)}</a>{mark(3)}"),  # a text that looks like a mark
    ],
)
def test_what_does_not_give_the_rendering_proves_nothing(rendering: str, with_marks: str) -> None:
    assert align(rendering, with_marks, fields("x")) is None


def test_tags_of_thoughts_stay_where_templates_look_for_them() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"}]
    found = masked(messages, (), full=True)
    assert [message["content"] for message in found.messages] == [mark(0), f"<think>{mark(1)}</think>{mark(2)}"]
    assert [field.text for field in found.fields] == ["q", "\nso\n", "\n\nyes"]
    assert tags_before("<think>\n\n</think>\n\nyes") == "<think>\n\n</think>"
    assert tags_before("yes <think>") == tags_before("<think>") == ""
