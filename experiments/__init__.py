"""The study: six optimisers race on images; run it with `python -m experiments` or `nox -s experiments`.

    config -> data -> models, algorithms -> training -> runner -> results -> table, figures, claims -> report

One idea a file, imports in that direction. `runner` alone knows about checkpoints and MLflow; what follows it reads results only.
"""
