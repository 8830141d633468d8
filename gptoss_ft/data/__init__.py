"""Rows of known schemas to token samples, and samples to batches."""
