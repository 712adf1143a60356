"""The laws that every stage obeys, as tests that the author of a stage inherits. Wants `pip install kfactk[testing]`.

One module a family holds its laws (those of bases are spread over `basis`, `basis_state` and `basis_traits`, by what they are about);
`laws` is the frame of all. What laws draw is in `strategies` (layers, what flowed through them, terms), `situations` (a layer and its
basis) and `trajectories` (parameters under an update rule); what they are held against is in `truth` (per-example gradients, dense
matrices) and `distributions` (Fisher information, frequencies); `models` and `training` run whole recipes.
"""

import importlib.util

if _missing := [
    name for name in ("hypothesis", "pytest") if importlib.util.find_spec(name) is None
]:
    raise ModuleNotFoundError(
        f"kfactk.testing wants {' and '.join(_missing)}: pip install 'kfactk[testing]'",
        name=_missing[0],
    )

from kfactk.testing._support import truth as truth
from kfactk.testing._support.laws import (
    Law as Law,
    Laws as Laws,
    close as close,
    effort as effort,
    law as law,
)
from kfactk.testing._support.situations import Situation as Situation
from kfactk.testing._support.strategies import Case as Case
from kfactk.testing.basis import BasisLaws as BasisLaws
from kfactk.testing.clip import ClipLaws as ClipLaws
from kfactk.testing.curvature import CurvatureLaws as CurvatureLaws
from kfactk.testing.fisher import FisherLaws as FisherLaws
from kfactk.testing.likelihood import LikelihoodLaws as LikelihoodLaws
from kfactk.testing.pipeline import PipelineLaws as PipelineLaws
from kfactk.testing.placement import PlacementLaws as PlacementLaws
from kfactk.testing.tracker import Recorded as Recorded, TrackerLaws as TrackerLaws
from kfactk.testing.update import UpdateLaws as UpdateLaws
