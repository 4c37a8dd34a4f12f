"""One self-contained HTML page about a tuning database: data, figures, page."""
