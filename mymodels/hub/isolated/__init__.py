"""The code of the clean process: started by `run.py` under the package name `mymodels_clean`, without mymodels.

Modules here import nothing of mymodels outside this folder. A process that ran untrusted code may report anything, so
what matters most is checked outside of it: `hub/weights.py` compares the weights.
"""
