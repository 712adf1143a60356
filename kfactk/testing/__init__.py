"""Laws of stages: tests that the author of a stage inherits. Needs the extra `testing`.

Each module holds the laws of one stage family. The folder `_support` holds the rest:

- `laws`: the frame of all laws.
- `strategies`, `situations`, `trajectories`: what laws draw, namely layers and their calls, layers
  with a basis, and parameters under an update rule.
- `truth`, `distributions`: what laws compare with, namely per-example gradients and dense matrices,
  Fisher information and frequencies.
- `models`, `training`, `ranks`: runs of whole recipes, in one process and on several ranks.
"""

import importlib.util

if _missing := [
    name for name in ("hypothesis", "pytest") if importlib.util.find_spec(name) is None
]:
    raise ModuleNotFoundError(
        f"kfactk.testing needs {' and '.join(_missing)}: run pip install '.[testing]' in a clone "
        "of kfactk",
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
from kfactk.testing.controller import ControllerLaws as ControllerLaws
from kfactk.testing.curvature import CurvatureLaws as CurvatureLaws
from kfactk.testing.fisher import FisherLaws as FisherLaws
from kfactk.testing.gradient_curvature import (
    GradientCase as GradientCase,
    GradientCurvatureLaws as GradientCurvatureLaws,
)
from kfactk.testing.likelihood import LikelihoodLaws as LikelihoodLaws
from kfactk.testing.link import LinkLaws as LinkLaws
from kfactk.testing.pace import PaceLaws as PaceLaws
from kfactk.testing.pipeline import PipelineLaws as PipelineLaws
from kfactk.testing.placement import PlacementLaws as PlacementLaws
from kfactk.testing.tracker import Recorded as Recorded, TrackerLaws as TrackerLaws
from kfactk.testing.update import UpdateLaws as UpdateLaws
