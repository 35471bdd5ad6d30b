"""Proof by killing: runs that are killed at chosen instants, and how they compare with one that was not."""
