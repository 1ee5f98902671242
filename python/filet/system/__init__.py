"""Files, memory, threads and names: complete or absent files, shortages, copies, locks.

It knows torch and no model. It imports nothing of this package but itself.
"""
