"""The version of kfactk; nothing else states it."""

__version__ = "0.1.0"
