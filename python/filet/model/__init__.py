"""What transformers and PEFT give: targets, blocks, batches, model folders, a model held still.

It knows those libraries, and nothing of moments, energies or choices.
"""
