"""First-party stages of the family clip."""
