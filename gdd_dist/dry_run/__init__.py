"""--dry-run: what a run would do, and what resources it would need."""
