"""The command line: `python -m kfactk`."""
