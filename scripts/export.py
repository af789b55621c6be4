"""Write a policy as one file that acts without cpql: `python scripts/export.py --help`."""

from cpql.cli import export

if __name__ == "__main__":
    export()
