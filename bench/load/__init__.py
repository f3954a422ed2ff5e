"""Load on a real aggregator process: ``python -m bench.load``."""
