"""Many virtual devices and one aggregator in one process: what each method learns, and what it sends and computes."""
