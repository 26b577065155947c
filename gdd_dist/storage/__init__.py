"""Files that are whole or not there: finished steps, checkpoints, JSON."""
