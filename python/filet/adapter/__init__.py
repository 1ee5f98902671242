"""An initialised adapter: the only writer of weights and of adapter files.

It is told what was chosen. It runs no model and takes no moment.
"""
