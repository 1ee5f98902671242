"""Batches in, second moments out: hooks, the pass, its plan, the statistics and their file.

It never writes a weight.
"""
