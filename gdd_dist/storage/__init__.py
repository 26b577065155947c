"""Atomically written files: finished steps, checkpoints, JSON."""
