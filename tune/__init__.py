"""Hyper-parameter search over gdd_dist; imports gdd_dist, and nothing in gdd_dist imports it."""
