"""Charts, pictures and page templates of reports."""
