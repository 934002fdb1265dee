"""Ground truth by retraining: what models say that never saw half of the data."""
