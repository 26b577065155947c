"""Students: which ones are trained, on what, and their accuracy."""
