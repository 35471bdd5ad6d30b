"""Proof by killing: runs that are killed at chosen instants, and what they must have in common with one that was not."""
