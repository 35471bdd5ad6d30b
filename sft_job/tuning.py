"""Environment variables that make ranks start and run faster; what the user has set stays."""

from __future__ import annotations

from collections.abc import Mapping

from sft_job.contract import RunFolder


def tuned(environ: Mapping[str, str], run: RunFolder, threads: int) -> dict[str, str]:
    """Variables to add to a rank's environment.

    Args:
        environ: what the ranks start from.
        run: its folder keeps compiled kernels from one start to the next.
        threads: cores for each rank.
    """
    kernels = run.kernels
    wanted = {
        # Pieces of any size from one range of addresses: 5 to 15 % more tokens before memory runs out.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(16, threads))),
        "TRITON_CACHE_DIR": str(kernels / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(kernels / "flash4"),
    }
    if "PYTORCH_ALLOC_CONF" in environ:  # its newer name
        del wanted["PYTORCH_CUDA_ALLOC_CONF"]
    return {name: value for name, value in wanted.items() if name not in environ}
