"""The status on a screen: a line or two for each thing, calm at 80 columns; as JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_job.metrics.console import amount, bar, duration
from sft_job.status.read import RunStatus

_STYLES = {
    "running": "green",
    "done": "green",
    "waiting": "yellow",
    "stopped": "yellow",
    "absent": "yellow",
    "silent": "red",
    "lost": "red",
    "failed": "bold red",
}
_RESTARTS_SHOWN = 4
_MESSAGE_LINES = 30


def status_json(status: RunStatus) -> str:
    """One object, the fields of ``RunStatus``."""
    return json.dumps(dataclasses.asdict(status), indent=1)


def show_status(status: RunStatus, console: Console) -> None:
    """Print it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(status):
        table.add_row(name, text)
    console.print(table)


def rows(status: RunStatus) -> list[tuple[str, Text]]:
    """Name and text of each line; what is not known has none."""
    found: list[tuple[str, Text]] = [("run", Text(status.run)), ("state", _state(status))]
    if status.held_by:
        found.append(
            ("held by", _block([f"job {status.held_by}; this job:", *(status.last_words or ["not a word yet"])]))
        )
    if status.state != "absent":
        found += _progress(status)
        found += [("checkpoint", _checkpoint(status))]
    if status.result:
        found.append(("result", Text(status.result)))
    found += _restarts(status)
    found += _judgement(status)
    if status.message and status.state not in ("running", "done"):
        found.append(("message", _block(status.message.splitlines())))
    if status.refusal is not None:
        found.append(("refused", _refusal(status)))
    if status.last_words and not status.message and status.refusal is None and not status.held_by:
        found.append(("last words", _block(status.last_words)))
    found += _places(status)
    return found


def _state(status: RunStatus) -> Text:
    text = Text().append(_word(status), _STYLES.get(status.state))
    holder = status.holder
    if status.state == "running" and holder is not None:
        first = ", before its first step" if not status.step else ""
        text.append(f" on {holder['host']} since {_clock(holder['since'])} (process {holder['pid']}{first})")
    if advice := _advice(status):
        text.append(f"\n{advice}")
    return text


def _word(status: RunStatus) -> str:
    if status.state == "failed":
        code, reason = status.code, status.reason
        if status.refusal is not None:
            code, reason = status.refusal["code"], status.refusal["reason"]
        return f"failed with exit code {code} ({reason})"
    if status.state == "stopped":
        return f"stopped with exit code {status.code}"
    if status.state == "lost":
        return f"lost (exit code {status.code})" if status.code else "lost"
    if status.state == "absent" and status.submission is not None and status.submission.place:
        return f"its run folder is not seen from here: it lies on {status.submission.place}"
    return {
        "waiting": "waiting for requeue",
        "silent": "no sign of life",
        "absent": "there is no run folder: nothing was started in it yet",
    }.get(status.state, status.state)


def _advice(status: RunStatus) -> str:
    """What the state means for who looks at it."""
    if status.state == "silent" and status.holder is not None:
        held = f"process {status.holder['pid']} on {status.holder['host']} holds the run folder"
        return (
            f"{held}, but was still for {status.watched:.0f} s: its host is lost, or its file server slow; look again"
        )
    if status.state == "waiting":
        ask = f" ({status.submission.ask})" if status.submission and status.submission.ask else ""
        return f"queued again: {status.requeue}\nonly its launcher knows whether it was cancelled there since{ask}"
    place = f"from step {status.checkpoint.step}" if status.checkpoint else "from the start"
    again = f"run it again, or let its launcher do so: it goes on {place}"
    if status.state == "lost" and status.code is None:
        return f"its process is gone and wrote nothing at its end; {again}"
    if status.state in ("lost", "stopped"):
        return again
    return ""


def _progress(status: RunStatus) -> list[tuple[str, Text]]:
    total = status.total_steps
    if total:
        line = f"{bar(status.step / total)}  step {status.step:,} of {total:,} ({100 * status.step // total} %)"
    else:
        line = f"step {status.step:,}"
    if status.epoch is not None:
        line += f", epoch {status.epoch:.2f}"
    if status.seconds_left is not None and status.step:
        line += f"\nabout {duration(status.seconds_left)} left, without saves and validations"
    found = [("progress", Text(line))]
    losses = [] if status.loss is None else [f"{status.loss:.4f}"]
    if status.validation_loss is not None:
        losses.append(f"validation {status.validation_loss:.4f} at step {status.validation_step}")
    if status.learning_rate is not None:
        losses.append(f"learning rate {status.learning_rate:.2e}")
    if losses:
        found.append(("loss", Text(", ".join(losses))))
    speed = status.tokens_per_second_per_gpu
    if speed is not None:
        parts = [f"{amount(speed)} tokens/s per GPU"]
        if status.ranks and status.ranks > 1:
            parts.append(f"{amount(speed * status.ranks)} over {status.ranks} ranks")
        if status.step_seconds is not None:
            parts.append(f"{status.step_seconds:.2f} s a step")
        found.append(("speed", Text(", ".join(parts))))
    if status.logged:
        found.append(("logged", Text(f"{_clock(status.logged)}, by the file time of metrics.jsonl")))
    return found


def _checkpoint(status: RunStatus) -> Text:
    checkpoint = status.checkpoint
    if checkpoint is None:
        return Text("none yet")
    text = Text(f"step {checkpoint.step:,}, ")
    if checkpoint.fault:
        text.append("cannot be used", "red").append(f": {checkpoint.fault}")
    else:
        text.append("whole", "green")
        text.append(", every byte read" if checkpoint.verified else " by names and sizes")
    if checkpoint.saved:
        text.append(f", saved {_clock(checkpoint.saved)}")
    return text.append(f"\n{checkpoint.folder}")


def _restarts(status: RunStatus) -> list[tuple[str, Text]]:
    found: list[tuple[str, Text]] = []
    count = len(status.restarts) + status.restarts_omitted
    if count:
        last = [f"{each.get('cause')} at step {each.get('step')}" for each in status.restarts[-_RESTARTS_SHOWN:]]
        text = f"{count}: {', '.join(last)}"
        if count > len(last):
            causes = Counter(str(each.get("cause")) for each in status.restarts)
            text = f"{count}: " + ", ".join(f"{number} {cause}" for cause, number in causes.most_common())
            text += f"\nthe last: {', '.join(last)}"
        found.append(("restarts", Text(text)))
    if status.without_progress:
        lines = [f"{each['cause']}: {each['message']}".rstrip(": ") for each in status.without_progress]
        head = f"the last {len(lines)} starts made no new step" if len(lines) > 1 else "the last start made no new step"
        found.append(("", _block([head, *(f"  {line}" for line in lines[-_RESTARTS_SHOWN:])])))
    if status.incomplete:
        text = f"not all nodes came to {len(status.incomplete)} more; the last: {status.incomplete[-1]['message']}"
        found.append(("", Text(text)))
    return found


def _judgement(status: RunStatus) -> list[tuple[str, Text]]:
    """What the launcher made of the end of its job, and how often it queued it again after what."""
    found = status.judgement
    if found is None:
        return []
    lines = [f"{found}, {_clock(found.at)}", *found.why.splitlines()]
    if found.counts:
        lines.append(f"queued again after: {', '.join(f'{cause} {number}' for cause, number in found.counts.items())}")
    return [("launcher", _block(lines))]


def _refusal(status: RunStatus) -> Text:
    refusal = status.refusal or {}
    head = f"a start at {_clock(str(refusal['at']))} did nothing: exit code {refusal['code']} ({refusal['reason']})"
    return _block([head, *str(refusal["message"]).splitlines()])


def _places(status: RunStatus) -> list[tuple[str, Text]]:
    found: list[tuple[str, Text]] = []
    submission = status.submission
    if submission is not None:
        text = f"{submission}, submitted {_clock(submission.submitted)}"
        found.append(("job", Text(text + (f"\nask the launcher: {submission.ask}" if submission.ask else ""))))
    logs = [status.logs] if status.state != "absent" else []
    logs += status.launcher_logs or (submission.logs if submission else ())
    if logs:
        found.append(("logs", Text("\n".join(logs))))
    return found


def _block(lines: list[str] | tuple[str, ...]) -> Text:
    more = [f"... {len(lines) - _MESSAGE_LINES} more lines"] if len(lines) > _MESSAGE_LINES else []
    return Text("\n".join([*lines[:_MESSAGE_LINES], *more]))


def _clock(text: str) -> str:
    """A stored local time as people write it."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text
