"""The report: tables, figures, the page, metrics.json."""
