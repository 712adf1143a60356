"""kfactk: natural-gradient optimisers for PyTorch, composed from exchangeable stages."""

from kfactk._version import __version__ as __version__
from kfactk.assignment import (
    Assignment as Assignment,
    Share as Share,
    Work as Work,
    Workload as Workload,
    balance as balance,
    grid as grid,
)
from kfactk.averages import RunningMean as RunningMean
from kfactk.coverage import Coverage as Coverage
from kfactk.errors import (
    CaptureError as CaptureError,
    CombinationError as CombinationError,
    DecompositionError as DecompositionError,
    KfactkError as KfactkError,
    KfactkWarning as KfactkWarning,
    OptionError as OptionError,
    PluginError as PluginError,
    StateError as StateError,
    UnknownStageError as UnknownStageError,
)
from kfactk.hookspecs import PLUGIN_API as PLUGIN_API, hookimpl as hookimpl
from kfactk.optimizer import Optimizer as Optimizer
from kfactk.profiling import Profile as Profile
from kfactk.recipe import Recipe as Recipe, build as build
from kfactk.samples import Samples as Samples, Statistic as Statistic, Use as Use, project as project, project_channels as project_channels
from kfactk.schedule import early as early
from kfactk.stages import (
    Basis as Basis,
    Clip as Clip,
    Coupling as Coupling,
    Curvature as Curvature,
    Decomposition as Decomposition,
    Dot as Dot,
    Fisher as Fisher,
    Layer as Layer,
    Likelihood as Likelihood,
    MakesOperator as MakesOperator,
    Operator as Operator,
    Pair as Pair,
    PartsFactors as PartsFactors,
    Placement as Placement,
    Redecomposes as Redecomposes,
    Tensors as Tensors,
    Tracker as Tracker,
    Update as Update,
)
from kfactk.torch_optimizer import TorchOptimizer as TorchOptimizer
from kfactk.views import LayerView as LayerView
