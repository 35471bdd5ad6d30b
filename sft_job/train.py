"""Entry of one rank: join the others, train, leave with the right exit code.

The supervisor starts it with ``--resolved FILE``; torchrun with a config file and ``key=value`` overrides.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_job.config.load import load_resolved
from sft_job.config.resolve import resolve
from sft_job.config.schema import JobConfig
from sft_job.config.secrets import secrets_hidden
from sft_job.config.topology import count_gpus
from sft_job.contract import STACK_SIGNAL, Env, ExitCode
from sft_job.data.files import check_data
from sft_job.deadline import REASON as DEADLINE
from sft_job.deadline import Deadline
from sft_job.errors import JobError, raise_problems
from sft_job.job import train
from sft_job.memory import out_of_memory_text
from sft_job.preflight.start import compare_nodes
from sft_job.processes import supervisor_gone
from sft_job.pulse import Pulse, pulse_file
from sft_job.runtime import StopWish, die_with_parent, start_runtime
from sft_job.streams import say, settle_streams
from sft_job.trainer import Ending

RESOLVED = "--resolved"
# Gloo raises plain RuntimeErrors.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank; the exit code of what happened. Never raises."""
    stop = StopWish().install()
    faulthandler.enable()
    pulse = _under_supervisor(stop)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    code, message, ending, details = ExitCode.BUG, "", None, ""
    try:
        config = _config(list(sys.argv[1:] if arguments is None else arguments))
        runtime = start_runtime(config.trainer.timeout_seconds, config.trainer.deterministic, pulse)
        compare_nodes(config, runtime, os.environ)
        ending = train(config, runtime, stop)
        code = ExitCode.STOPPED if ending and ending.stopped else ExitCode.DONE
        if code == ExitCode.STOPPED and not stop.signal and stop.wished:
            message = f"{DEADLINE}: stopped while there was time to save"
        dist.barrier()
        dist.destroy_process_group()
    except JobError as error:
        code, message = error.code, str(error)
        details = traceback.format_exc()
    except torch.OutOfMemoryError as error:
        advice = ["more GPUs", "model.fsdp_config.cpu_offload=true", "a smaller model"]
        code, message = ExitCode.OUT_OF_MEMORY, out_of_memory_text(error, "while the model was built", advice=advice)
        details = traceback.format_exc()
    except BaseException as error:  # whatever it is, the supervisor must hear of it
        code, message = _unexpected(error)
        details = traceback.format_exc()
    _report(code, message, ending)  # first: what follows may meet a full disk
    say(details)
    if message and Env.REPORT_DIR not in os.environ:
        say(f"rank {os.environ.get('RANK', '0')}: {message}\n")
    return code


def _under_supervisor(stop: StopWish) -> Pulse:
    """What a rank owes its supervisor: an end with it, stacks when asked, signs of life; its deadline comes back."""
    folder, rank = os.environ.get(Env.REPORT_DIR), int(os.environ.get("RANK", "0"))
    if folder is None:
        return Pulse()
    die_with_parent()
    faulthandler.register(STACK_SIGNAL, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACK_SIGNAL])
    deadline = os.environ.get(Env.DEADLINE)
    if deadline is not None and rank == 0:
        stop.deadline = Deadline(float(deadline))
    pulse = Pulse(pulse_file(Path(folder), rank))
    pulse.beat()
    return pulse


def _config(arguments: list[str]) -> JobConfig:
    if arguments[:1] == [RESOLVED]:
        return load_resolved(Path(arguments[1]))
    given = arguments[0] if arguments and "=" not in arguments[0] else None
    environ = _of_torchrun(os.environ)
    resolution = resolve(given, arguments[1:] if given else arguments, environ, count_gpus(environ))
    raise_problems([*resolution.problems, *check_data(resolution.loaded.config)])
    return resolution.loaded.config


def _of_torchrun(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with this job's names for what torchrun (or another launcher of ranks) says of the topology."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PET_")}
    if "WORLD_SIZE" not in environ:
        return kept
    world, local = int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
    nodes = world // local
    return kept | {
        Env.NPROC_PER_NODE: str(local),
        Env.NNODES: str(nodes),
        Env.NODE_RANK: environ.get("GROUP_RANK", str(int(environ.get("RANK", "0")) // local)),
    }


def _unexpected(error: BaseException) -> tuple[ExitCode, str]:
    """A lost peer shows as an error of the collective that waited for it; anything else is a bug."""
    text = str(error)
    if isinstance(error, dist.DistError) or any(sign in text for sign in _LOST_PEER):
        return ExitCode.LOST, f"lost another rank: {text.splitlines()[0]}"
    return ExitCode.BUG, f"{type(error).__name__}: {text}"


def _report(code: ExitCode, message: str, ending: Ending | None) -> None:
    """Tell the supervisor, where there is one, how this rank ended; it knows the exit code in any case."""
    rank, folder = os.environ.get("RANK", "0"), os.environ.get(Env.REPORT_DIR)
    if folder is None:
        return
    record: dict[str, Any] = {"rank": int(rank), "code": int(code), "message": message}
    if ending is not None:
        record |= {
            "step": ending.state.step,
            "loss": ending.state.loss,
            "weights_sha256": ending.state.weights_sha256,
        }
    if supervisor_gone(os.environ):
        shutil.rmtree(folder, ignore_errors=True)  # nobody reads it, and nobody else removes it
        return
    temporary = Path(folder) / f".rank_{rank}.tmp"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(Path(folder) / f"rank_{rank}.json")


if __name__ == "__main__":
    with secrets_hidden(os.environ):
        exit_code = main()
    settle_streams()
    # A rank whose peers are gone may hang in the teardown of its process group.
    os._exit(exit_code)
