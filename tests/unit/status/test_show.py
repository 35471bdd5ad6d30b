from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from sft_job.status.read import CheckpointStatus, RunStatus
from sft_job.status.show import show_status, status_json
from sft_job.submissions import Judgement, Requeue, Submission

RUNNING = RunStatus(
    run="/ckpt/sft",
    state="running",
    reason="running",
    holder={"host": "node7", "pid": 42, "job": "17", "since": "2026-11-23T15:02:11+01:00", "gone": False},
    step=40,
    total_steps=120,
    epoch=0.67,
    loss=1.23456,
    learning_rate=1e-5,
    validation_loss=1.5,
    validation_step=30,
    tokens_per_second_per_gpu=12345.0,
    step_seconds=9.5,
    ranks=8,
    seconds_left=760.0,
    checkpoint=CheckpointStatus("/ckpt/sft/checkpoints/global_step_30", 30, "2026-11-23T15:10:00+01:00", "", False),
    restarts=({"cause": "lost", "step": 2}, *({"cause": "stopped", "step": step} for step in range(3, 8))),
    logs="/ckpt/sft/logs",
)


def shown(status: RunStatus, width: int = 80) -> str:
    stream = io.StringIO()
    show_status(status, Console(file=stream, width=width))
    text = stream.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_a_running_run_on_one_screen() -> None:
    assert shown(RUNNING) == (
        "run         /ckpt/sft\n"
        "state       running on node7 since 2026-11-23 15:02:11 (process 42)\n"
        "progress    ━━━━━╌╌╌╌╌╌╌╌╌╌╌  step 40 of 120 (33 %), epoch 0.67\n"
        "            about 12:40 left, without saves and validations\n"
        "loss        1.2346, validation 1.5000 at step 30, learning rate 1.00e-05\n"
        "speed       12.3k tokens/s per GPU, 98.8k over 8 ranks, 9.50 s a step\n"
        "checkpoint  step 30, whole by names and sizes, saved 2026-11-23 15:10:00\n"
        "            /ckpt/sft/checkpoints/global_step_30\n"
        "restarts    6: 5 stopped, 1 lost\n"
        "            the last: stopped at step 4, stopped at step 5, stopped at step 6,\n"
        "            stopped at step 7\n"
        "logs        /ckpt/sft/logs"
    )


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"state": "lost"}, "its process is gone and wrote nothing at its end; run it again"),
        ({"state": "lost", "code": 137}, "lost (exit code 137)"),
        ({"state": "stopped", "code": 143}, "stopped with exit code 143"),
        ({"state": "silent", "watched": 8.0}, "process 42 on node7 holds the run folder, but was still for 8 s"),
        ({"state": "waiting", "requeue": Requeue("slurm", "7", "now")}, "queued again: slurm job 7, since now"),
        ({"state": "waiting", "requeue": Requeue("slurm", "7", "now")}, "whether it was cancelled there since"),
        (
            {"judgement": Judgement("slurm", "7", 3, "loss number 1: queued again", {"timeout": 2, "loss": 1}, "now")},
            "launcher slurm job 7, start 3, now loss number 1: queued again queued again after: timeout 2, loss 1",
        ),
        ({"state": "failed", "code": 87, "reason": "non_finite", "message": "loss is nan"}, "loss is nan"),
        ({"state": "done", "result": "/ckpt/sft/huggingface"}, "result      /ckpt/sft/huggingface"),
        ({"state": "failed", "without_progress": ({"cause": "lost", "message": "rank 1"},)}, "lost: rank 1"),
        (
            {"held_by": "17", "last_words": ("no", "luck")},
            "held by     job 17; this job:\n            no\n            luck\n",
        ),
        ({"held_by": "17"}, "held by job 17; this job: not a word yet"),
        (
            {"state": "failed", "incomplete": ({"cause": "lost", "message": "node 1 did not come"},)},
            "not all nodes came to 1 more; the last: node 1 did not come",
        ),
        ({"checkpoint": None}, "none yet"),
        ({"message": "[red]kept as it is[/red]", "state": "failed"}, "[red]kept as it is[/red]"),
        (
            {"state": "failed", "refusal": {"code": 2, "reason": "config", "message": "a\nb", "at": "t"}},
            "failed with exit code 2 (config)",
        ),
        (
            {"state": "absent", "submission": Submission("slurm", "7", "/r", ("/l/*.err",), "squeue -j 7", "t")},
            "ask the launcher: squeue -j 7",
        ),
        (
            {"state": "absent", "submission": Submission("kubernetes", "a", "/r", place="the claim runs")},
            "its run folder is not seen from here: it lies on the claim runs",
        ),
    ],
)
def test_what_each_state_says(more: dict, text: str) -> None:
    assert text in " ".join(shown(replace(RUNNING, **more)).split()) or text in shown(replace(RUNNING, **more))
    shown(replace(RUNNING, **more), width=40)


def test_little_is_known_at_first() -> None:
    text = shown(RunStatus(run="/r", state="running", logs="/r/logs"))
    assert text.splitlines() == [
        "run         /r",
        "state       running",
        "progress    step 0",
        "checkpoint  none yet",
        "logs        /r/logs",
    ]


def test_json_holds_it_all() -> None:
    record = json.loads(status_json(RUNNING))
    assert (record["state"], record["step"], record["checkpoint"]["fault"]) == ("running", 40, "")
    assert record["restarts"][0] == {"cause": "lost", "step": 2}
