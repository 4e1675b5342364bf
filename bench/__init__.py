"""Measurements of Wukong beside Dask's own schedulers: `python -m bench micro | futures | ...`.

All sides of a comparison are open and warm in one process tree, take turns, and get graphs that
were built before the clock starts.
"""

N_WORKERS = 2
"""Processes or threads of every side."""
