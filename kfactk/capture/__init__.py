"""See what flows through followed layers: hooks, forwards and Fisher passes."""
