"""Pace stages of kfactk."""
