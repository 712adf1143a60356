"""Link stages of kfactk."""
