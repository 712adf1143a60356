"""Placement stages of kfactk."""
