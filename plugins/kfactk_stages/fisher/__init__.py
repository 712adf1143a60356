"""Fisher stages of kfactk."""
