"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import run_ranks, start_server


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world, function, *arguments)`` runs a module-level function in gloo ranks; what each returned."""
    context = start_server()

    def run(world: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        return run_ranks(context, world, function, *arguments, **options)

    return run
