"""What can go wrong in a benchmark beyond what goes wrong in training.

BenchmarkError  nothing could be measured on this device: what the child said follows
"""


class BenchmarkError(Exception):
    """Nothing could be measured."""
