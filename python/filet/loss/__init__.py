"""A summed loss from whatever a model returns, with labels of the data or drawn from the model.

It reads outputs and batches. It knows no target and no moment.
"""
