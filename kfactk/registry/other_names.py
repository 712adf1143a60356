"""Names from the literature and other packages that stand for no stage here, and what does it."""

from __future__ import annotations

from collections.abc import Mapping

OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "likelihood": {
        "joint": (
            "That the model's heads are independent given its input needs no stage: give one "
            "likelihood for each part of the output, likelihood={'policy': 'categorical', 'value': "
            "'gaussian'}, or, with weights, a list of kfactk.head."
        ),
        "classification": "Cross entropy is that of likelihood='categorical'.",
        "cross_entropy": "Cross entropy is that of likelihood='categorical'.",
        "softmax": "Cross entropy is that of likelihood='categorical'.",
        "mse": "A squared error is that of likelihood='gaussian'.",
        "normal": "A squared error is that of likelihood='gaussian'.",
        "regression": "A squared error is that of likelihood='gaussian'.",
    },
}
"""By family and name, what to give instead."""
