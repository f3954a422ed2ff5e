"""The demo: export, four devices and one aggregator on this machine, driven by their commands as a script would."""
