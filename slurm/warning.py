"""The signal by which Slurm warns of a time limit or a preemption.

Slurm sends it to every process of the job, up to a minute early. Processes that know nothing of it ignore it, by its
default: so the task alone decides whether and when the job saves. With USR2, submitit's choice, the ranks would stop at
once.
"""

from __future__ import annotations

import signal

WARNING = signal.SIGURG
