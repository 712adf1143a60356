"""The optimizer that users hold: the step, checkpoints, metrics and views."""
