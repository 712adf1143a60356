"""Our replication of the thesis: six optimizers train on images.

Run it with `python -m experiments` or `nox -s experiments`. Modules import in this direction:

    config -> data -> models, algorithms -> training -> runner -> results
           -> table, figures, claims -> report

Only `runner` knows checkpoints and MLflow; the modules after it read results only. The thesis is
"Neural Network Optimization Based on K-FAC Algorithm", Tongji University, May 2021.
"""
