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
from kfactk.errors import (
    CaptureError as CaptureError,
    CombinationError as CombinationError,
    DecompositionError as DecompositionError,
    KfactkError as KfactkError,
    KfactkWarning as KfactkWarning,
    MemoryExhaustedError as MemoryExhaustedError,
    OptionError as OptionError,
    PluginError as PluginError,
    StateError as StateError,
    UnknownStageError as UnknownStageError,
)
from kfactk.jets import Jet as Jet, jet as jet
from kfactk.operators import (
    CurvatureOperator as CurvatureOperator,
    SpectralOperator as SpectralOperator,
)
from kfactk.optim.optimizer import Optimizer as Optimizer
from kfactk.optim.views import BlockView as BlockView
from kfactk.preconditioner.coverage import Coverage as Coverage
from kfactk.preconditioner.schedule import early as early
from kfactk.recipe import (
    Recipe as Recipe,
    block as block,
    build as build,
    head as head,
    preset as preset,
)
from kfactk.registry.hookspecs import PLUGIN_API as PLUGIN_API, hookimpl as hookimpl
from kfactk.registry.torch_optimizer import TorchOptimizer as TorchOptimizer
from kfactk.samples import (
    LayerCall as LayerCall,
    RowOrder as RowOrder,
    Samples as Samples,
    Statistic as Statistic,
    project as project,
    project_channels as project_channels,
)
from kfactk.stages import (
    Basis as Basis,
    Clip as Clip,
    Controller as Controller,
    Curvature as Curvature,
    Decomposition as Decomposition,
    Dot as Dot,
    FactorContext as FactorContext,
    Fisher as Fisher,
    GradientCurvature as GradientCurvature,
    GradientPair as GradientPair,
    InnerCall as InnerCall,
    Layer as Layer,
    Likelihood as Likelihood,
    Link as Link,
    LinkedLayer as LinkedLayer,
    ModuleCall as ModuleCall,
    Pace as Pace,
    Placement as Placement,
    Preparation as Preparation,
    Prepared as Prepared,
    QuadraticModel as QuadraticModel,
    Replay as Replay,
    Replayed as Replayed,
    Tensors as Tensors,
    Tracker as Tracker,
    Update as Update,
)
from kfactk.statistics import RunningMean as RunningMean
from kfactk.timing import Profile as Profile
