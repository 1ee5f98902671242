"""Norms, gates and positions in one pass each: they serve speed alone.

FILet's mathematics neither lives here nor takes anything from here, and all of it may be left out.
"""
