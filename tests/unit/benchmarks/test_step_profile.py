from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parts
from benchmarks.rows import rows_named
from benchmarks.shapes import write_model_folder
from benchmarks.step_profile import main, work_of
from sft_job.metrics.flops import FlopsShape, model_flops

ROOT = Path(__file__).parents[3]
FUSED = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
# Names as a trace of an H200 has them, in the order of a step: start and length in microseconds.
STEP = [
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", 0, 100),
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", 100, 500),
    ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at_", 600, 1000),
    ("nvjet_sm90_tst_192x208_64x4_2x1_v_bz_coopB_TNT", 1700, 900),
    ("triton_red_fused__to_copy_logsumexp_0", 2600, 300),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(", 2900, 200),
    ("kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess_", 3100, 100),
    ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at_", 3200, 2000),
    ("triton_poi_fused_add_clone_mul_neg_4", 5200, 50),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, at::native::NormTwoOps<", 5250, 40),
    (f"{FUSED}TensorListMetadata<1>, at::native::(anonymous namespace)::BinaryOpScalarTensorFunctor<", 5290, 60),
    (f"{FUSED}FusedOptimizerTensorListMetadata<4>, at::native::", 5350, 400),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 5400, 700),
]


def written(path: Path, step: list[tuple[str, int, int]]) -> Path:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": took} for name, start, took in step
    ]
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9999}, {"ph": "M", "name": "process"}]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[::-1]}, file)
    return path


def test_a_steps_time_by_what_it_is_for(tmp_path) -> None:
    kernels = parts.kernels_of(written(tmp_path / "trace.json.gz", STEP))
    found = {part: each["ms"] for part, each in parts.totals(kernels).items()}
    assert found == pytest.approx(
        {
            parts.GEMM: 1.4,
            parts.ATTENTION: 3.1,
            parts.BLOCKS: 0.15,
            parts.LOSS: 0.5,
            parts.NORM: 0.04,
            parts.CLIP: 0.06,
            parts.ADAMW: 0.4,
            parts.COMMUNICATION: 0.7,
            parts.IDLE: 0.1,
        }
    )
    assert parts.span(kernels) == pytest.approx(6.1), "what runs beside another counts once here"
    assert parts.top(kernels, 1)[0]["ms"] == pytest.approx(2.0)
    assert parts.totals([]) == {}


def test_work_is_that_of_the_model_and_floors_follow_from_it(tmp_path) -> None:
    row = rows_named(["qwen7b_full_2x8192"])[0]
    model = write_model_folder(tmp_path / "model", row.shape)
    work = work_of(model, [8192, 8192], frozen=False)
    assert work.gemm_flops == pytest.approx(695e12, rel=2e-3)
    assert work.parameters == pytest.approx(7.615e9, rel=1e-3)
    from transformers import AutoConfig

    shape = FlopsShape.from_config(AutoConfig.from_pretrained(model))
    assert work.gemm_flops + work.attention_flops == pytest.approx(model_flops(shape, [8192, 8192]))
    least = parts.floors(work, 695e12, 1e12)
    assert least[parts.GEMM] == pytest.approx(1000, rel=2e-3)
    assert least[parts.ADAMW] == pytest.approx(14 * 7.615, rel=1e-3)
    table = parts.table(
        {parts.GEMM: {"ms": 1250.0, "kernels": 5}, parts.OTHER: {"ms": 1250.0, "kernels": 1}}, work, least
    )
    assert "| matrix products | 1250.0 | 50.0% | 5 | 556 | 10" in table
    assert "| other | 1250.0 | 50.0% | 1 | - | - | - |" in table


def test_a_trace_that_is_there_needs_no_gpu(tmp_path) -> None:
    trace = written(tmp_path / "trace.json.gz", STEP)
    assert main(["--trace", str(trace), "--ceiling", "700", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "step_profile.json").read_text())
    assert record["parts"][parts.ATTENTION]["kernels"] == 3
    assert "| attention | 3.1 |" in (tmp_path / "out" / "step_profile.md").read_text()
    with pytest.raises(SystemExit, match="--trace needs --ceiling"):
        main(["--trace", str(trace)])
    with pytest.raises(SystemExit, match="qwen7b_fsdp2 needs 2 GPUs"):
        main(["--row", "qwen7b_fsdp2"])


def test_the_real_command_on_a_cpu(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.step_profile", "--shape", "tiny", "--device", "cpu"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    kept = tmp_path / "trace.json"
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--keep", str(kept)],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "step_profile.json").read_text())
    assert len(record["step_seconds"]) == 6
    assert record["parts"] == {}
    names = {event["name"] for event in json.loads(kept.read_text())["traceEvents"] if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::logsumexp"} <= names
    assert "a CPU's trace has no kernels" in (tmp_path / "step_profile.md").read_text()
