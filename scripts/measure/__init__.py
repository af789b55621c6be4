"""What `scripts/benchmark.py` measures that takes more than a page."""
