"""A model larger than the GPU, block by block: it orders what the folders below do.

It owns no mathematics: moments are taken by collect, choices are made by select.
"""
