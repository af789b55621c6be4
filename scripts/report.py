"""Runs as one HTML file: `python scripts/report.py --help`."""

from cpql.report_cli import main

if __name__ == "__main__":
    main()
