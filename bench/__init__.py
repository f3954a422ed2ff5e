"""Measurements, each a module to run: ``python -m bench.step --help``. Timings live here, never in tests."""
