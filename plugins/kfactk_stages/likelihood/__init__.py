"""Likelihood stages of kfactk."""
