"""``model.external_lib`` of the tests' jobs: makes steps long enough to strike between them, or a rank that dies.

``TEST_PACE``: seconds that each forward pass sleeps. ``TEST_DIES``: the first forward pass kills its rank.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook


def _pause(module: Module, arguments: Any) -> None:
    if "CausalLMLoss" in type(module).__name__:
        if os.environ.get("TEST_DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("TEST_PACE", "0")))


register_module_forward_pre_hook(_pause)
