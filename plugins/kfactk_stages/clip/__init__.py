"""Clip stages of kfactk."""
