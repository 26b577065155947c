"""The six steps after the shards: teachers, logits, gaussian, gan, matching, report."""
