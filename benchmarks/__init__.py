"""Benchmarks: both sides in one run, correctness asserted first, results as JSON."""
