"""First-party stages of the family placement."""
