"""How far honest devices are from each other, and which rule of outliers finds others: ``python -m bench.outliers``."""
