"""Processes: ranks, signals, locks, progress, and exit statuses."""
