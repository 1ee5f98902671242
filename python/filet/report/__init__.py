"""What an initialisation did, as data, a table and a picture.

It reads no model, and imports neither transformers nor PEFT.
"""
