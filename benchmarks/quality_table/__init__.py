"""LDS of this library and of others, on the same ground truth and checkpoints."""
