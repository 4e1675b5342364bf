"""From a Dask graph to strands: what to run, and in which pieces."""
