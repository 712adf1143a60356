"""Controller stages of kfactk."""
