"""How much torch.compile has compiled in this process, and where it gave up and runs as plain Python."""

from __future__ import annotations

from torch._dynamo.utils import counters

_LIMIT = "recompile limit"


def compilations() -> int:
    """Graphs compiled so far; each pass (training, validation) and each kind of block has its own."""
    return counters["stats"]["unique_graphs"]


def given_up() -> str:
    """A warning where torch.compile hit its limit of compilations, empty where it did not.

    Beyond the limit it runs a function uncompiled, says so once on standard error, and the run is only slower.
    """
    # The counter's key is the whole message, whose first line names the kind.
    hits = sum(n for kinds in list(counters.values()) for key, n in list(kinds.items()) if _LIMIT in str(key).lower())
    if not hits:
        return ""
    return (
        f"torch.compile hit its limit of compilations after {compilations()} graphs and runs a part of the model "
        "uncompiled: slower, the same results\n    fix: TORCH_LOGS=recompiles says what changes between steps; "
        "model.compile=false compiles nothing"
    )
