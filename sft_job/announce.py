"""What a run says of itself before its first step."""

from __future__ import annotations

from sft_job.checkpoint.state import RunState
from sft_job.config.schema import JobConfig
from sft_job.data.mixture import Mixture, Rows, named_caches
from sft_job.metrics.loggers import Loggers
from sft_job.model.attention.choose import AttentionChoice
from sft_job.optimizer import learning_rate


def tell_start(
    logger: Loggers,
    config: JobConfig,
    attention: AttentionChoice,
    rows: Rows,
    validation: Rows | None,
    state: RunState,
    summed: str = "",
) -> None:
    """Tell rows, steps and the learning rate's curve, and what the data report notes and warns of.

    ``summed`` is a line on how gradients of micro-batches add up, empty where there is nothing to say.
    """
    reports = [cache.report for cache in named_caches(rows).values()]
    for line in dict.fromkeys(line for report in reports for line in (*report["notes"], *report["warnings"])):
        logger.message(line)
    for line in _set_lines(rows):
        logger.message(line)
    tokens = int(rows.lengths.sum(dtype="int64"))
    logger.message(
        f"{rows.num_rows:,} training rows, {tokens:,} tokens; validation rows: "
        f"{validation.num_rows if validation else 0:,}; {attention.text}"
    )
    if attention.slow:
        logger.warning(f"attention: {attention.backend.name} is slow here: {attention.slow}")
    if summed:
        logger.message(summed)
    total = state.total_steps
    logger.message(f"steps {state.step} to {total}, {state.steps_per_epoch} an epoch")
    quarters = {total * part // 4 for part in (1, 2, 3)}
    places = sorted(step for step in {state.step, *quarters, total - 1} if state.step <= step < total)
    curve = ", ".join(f"{learning_rate(config.optim, step, total):.3g} at step {step + 1}" for step in places)
    logger.message(f"learning rate ({config.optim.lr_scheduler}): {curve}")


def _set_lines(rows: Rows) -> list[str]:
    """What each named set is, and what an epoch takes of it."""
    if not isinstance(rows, Mixture):
        return []
    total = sum(rows.entries)
    lines: list[str] = []
    for each, count in zip(rows.sets, rows.entries, strict=True):
        tokens = int(each.cache.lengths.sum(dtype="int64"))
        share = f"{count:,} of an epoch's {total:,} rows ({count / total:.1%})"
        lines.append(f"data set {each.name}: {each.cache.num_rows:,} rows, {tokens:,} tokens; {share}")
    return lines
