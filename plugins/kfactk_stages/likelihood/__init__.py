"""First-party stages of the family likelihood."""
