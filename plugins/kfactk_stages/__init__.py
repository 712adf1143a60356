"""The stages of kfactk: one module each, found through the entry points of the group `kfactk`."""
