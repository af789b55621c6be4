"""Score a checkpoint: `python scripts/evaluate.py --help`."""

from cpql.cli import evaluate

if __name__ == "__main__":
    evaluate()
