"""What the laws share: drawn inputs, dense truth, and small training runs."""
