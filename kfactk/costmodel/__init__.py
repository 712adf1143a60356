"""Predict the time and memory of a step from counts and a hardware profile."""
