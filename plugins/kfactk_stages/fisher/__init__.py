"""First-party stages of the family fisher."""
