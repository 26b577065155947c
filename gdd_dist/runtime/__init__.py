"""Processes: ranks, signals, locks, progress, and how a program ends."""
