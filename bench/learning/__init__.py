"""Is learning lost? The same training by peft and by every kind of bundle: ``python -m bench.learning --help``."""
