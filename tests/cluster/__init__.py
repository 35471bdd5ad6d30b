"""Tests on real schedulers, started for them on this machine."""
