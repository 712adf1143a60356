"""The first-party stages of kfactk, one algorithm a file; they enter through the same entry points as a stranger's."""
