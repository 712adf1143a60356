"""Studies that compare optimizers: ours of the thesis, and your own.

Run them with `python -m experiments` or `nox -s experiments`. Modules import in this direction:

    settings -> store -> data, models, algorithms -> tasks -> training -> runner
             -> tracking, progress, search -> experiment
    store -> results -> statistics -> claims, figures, tables -> report -> experiment

The modules from `results` to `report` know neither models nor optimizers: they read files. The
thesis is "Neural Network Optimization Based on K-FAC Algorithm", Tongji University, May 2021.
"""
