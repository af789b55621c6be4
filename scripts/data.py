"""Look at datasets, fetch, check and convert them: `python scripts/data.py --help`."""

import sys

from cpql.data_cli import main

if __name__ == "__main__":
    sys.exit(main())
