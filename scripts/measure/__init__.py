"""What `scripts/benchmark.py` runs, one file a command."""
