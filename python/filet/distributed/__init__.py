"""Several processes of torch.distributed: what they tell each other, and tensors on their way.

It knows tensors and samplers, and nothing of a model.
"""
