"""Update stages of kfactk."""
