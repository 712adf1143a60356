"""Tracker stages of kfactk."""
