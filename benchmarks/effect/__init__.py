"""What an initialisation does for fine-tuning: populations of adapters trained side by side.

``python benchmarks/effect/run.py`` trains and writes CSV files; ``tables.py`` and ``figures.py``
read those alone. docs/evidence.md says what was found.
"""
