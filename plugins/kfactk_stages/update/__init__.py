"""First-party stages of the family update."""
