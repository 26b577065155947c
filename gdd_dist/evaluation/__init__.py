"""Students: which are trained, on what, and how well they do."""
