"""The side of the box that runs in the confined process: the standard library only, started by its path.

`enter.py` is the program. Nothing here imports mymodels, torch or a package.
"""
