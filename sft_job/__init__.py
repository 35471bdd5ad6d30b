"""Supervised fine-tuning of language models: one job, the same on a laptop, Slurm and Kubernetes."""

__version__ = "0.1.0"
