"""Pieces that YAML and its readers stumble over, and texts in which they are strewn: for tests of bad configs."""

from __future__ import annotations

import random

PIECES = (
    *(
        "\t",
        "\n",
        "  ",
        ":",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "<<: *a\n",
        "!!int ",
        "!!python/none ",
        "!x ",
    ),
    *(
        "!!python/object/apply:os.system [true]",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!timestamp 2020-01-01",
        "|\n",
        ">-\n",
    ),
    *(
        "${",
        "${oc.env:X}",
        "${trainer}",
        "${.}",
        "${..}",
        "${oc.create:{a: 1}}",
        "${oc.env:HOME}",
        "???",
        "#",
        "'",
        '"',
    ),
    *(
        "\0",
        "\ufeff",
        "\x85",
        "\u2028",
        "\ud800",
        "\U0001f600",
        "\x1b[31m",
        "é",
        "\r",
        "\\",
        "=",
        "%YAML 1.2\n",
        "---\n",
    ),
    *("null", "no", "010", "12:30", ".nan", "-.inf", "1e999", "9" * 400, "0x" + "f" * 99, "-1", "0", "1e-400", "...\n"),
    *("../../../../etc/passwd", "/dev/zero", "/proc/self/mem", "/", "~", "*", "**/*", "\n\n", "? ", "true", "''", "[]"),
)


def changed_text(text: str, draw: random.Random) -> str:
    """The text after a few cuts and insertions of pieces, lines of its own or single characters."""
    for _ in range(draw.randint(1, 6)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice([0, 0, 1, 3, 20]))
        lines = text.splitlines(keepends=True) or [""]
        piece = draw.choice([draw.choice(PIECES), draw.choice(lines), chr(draw.randrange(1, 0x2FF)), ""])
        text = text[:start] + piece + text[end:]
    return text
