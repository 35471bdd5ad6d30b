"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.ranks import run_ranks, start_server

# No test is timed: a machine may be busy with other things.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world, function, *arguments)`` runs a module-level function in gloo ranks; what each returned."""
    context = start_server()

    def run(world: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        return run_ranks(context, world, function, *arguments, **options)

    return run
