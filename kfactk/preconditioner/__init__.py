"""Keep and apply curvature: blocks, their state, their schedule and their placement."""
