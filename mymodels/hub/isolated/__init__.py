"""What runs inside the clean process: started by `run.py`, under the name `mymodels_clean`, without mymodels.

Nothing here may import mymodels outside this folder, and nothing outside may rely on what a process reports that ran
somebody's code: the weights, for one, are compared by `weights.py` outside.
"""
