"""``model.external_lib`` of the tests' jobs: makes steps long enough to strike between them, or a rank that dies.

``TEST_PACE``: seconds that each forward pass sleeps. ``TEST_DIES``: the first forward pass kills its rank.
``TEST_SEEN``: folder into which each rank writes what it sees of ``FROM_SETUP``, in a file of its number.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook


def _pause(module: Module, arguments: Any) -> None:
    if "CausalLMLoss" in type(module).__name__:
        if os.environ.get("TEST_DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("TEST_PACE", "0")))


register_module_forward_pre_hook(_pause)

if os.environ.get("TEST_SEEN") and "RANK" in os.environ:
    Path(os.environ["TEST_SEEN"], os.environ["RANK"]).write_text(os.environ.get("FROM_SETUP", ""), encoding="utf-8")
