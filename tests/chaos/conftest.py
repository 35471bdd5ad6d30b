from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.faults import Bench
from tests.chaos.inputs import make_inputs
from tests.chaos.server import Server
from tests.chaos.shim import compiler


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A fork server with the shim preloaded, and the inputs of a tiny run."""
    if compiler() is None:
        pytest.skip("no C compiler: the shim that watches the file calls cannot be built")
    inputs = tmp_path_factory.mktemp("chaos_inputs")
    with Server() as server:
        server.call(make_inputs, inputs)
        yield Bench(server, inputs)
