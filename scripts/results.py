"""Put finished runs beside one another: `python scripts/results.py --help`."""

from cpql.results_cli import main

if __name__ == "__main__":
    main()
