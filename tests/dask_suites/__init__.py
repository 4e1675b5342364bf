"""Dask's own installed test suites, run twice: with Dask's schedulers, and with Wukong's.

python -m tests.dask_suites [--mode threads|processes] [--sample N | --full]
"""
