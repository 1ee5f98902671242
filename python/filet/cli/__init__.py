"""The command line: ``filet init``, ``filet stats`` and ``filet inspect``.

Nothing imports it. What it does, a user of the library can do as well.
"""
