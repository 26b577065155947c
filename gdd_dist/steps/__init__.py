"""The five steps after the shards: teachers, logits, gan, matching, report."""
