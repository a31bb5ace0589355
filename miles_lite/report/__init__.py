"""One HTML file about runs that a browser opens without a network: see docs/report.md."""
