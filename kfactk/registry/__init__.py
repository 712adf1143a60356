"""Find stages: plugins, their hooks, names, options and JSON forms."""
