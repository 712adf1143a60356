"""First-party stages of the family basis."""
