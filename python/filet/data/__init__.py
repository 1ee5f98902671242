"""Data sets into samples, and samples into the batches that a decoder's loss takes.

The command line and the examples use it. Nothing in the library does: any dataloader will do.
"""
