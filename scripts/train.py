"""Train a consistency policy: `python scripts/train.py --help`."""

from cpql.cli import train

if __name__ == "__main__":
    train()
