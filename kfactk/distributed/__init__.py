"""Move tensors between ranks. Pure transport: it knows no curvature."""
