"""The figures of README and docs, a module for each kind of record; benchmarks/figures.py writes them into the pages."""
