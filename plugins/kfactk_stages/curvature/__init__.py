"""First-party stages of the family curvature."""
