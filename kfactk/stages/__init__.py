"""Stage families: the base class or protocol of each, and the classes that pass between stages.

    model --capture--> LayerCall --curvature--> Samples --> Statistic (factors)
          --basis--> decomposition --> CurvatureOperator
          --link--> GradientPair --clip--> --update-->

Known methods are combinations of parts:

    K-FAC      = curvature kfac | conv_kfac, basis kfac,  update momentum
    EKFAC      = curvature kfac | conv_kfac, basis ekfac, update momentum
    EKFACnag   = ... update nag;   EKFACadam = ... update adam;   EKFACradam = ... update radam

All stages share one mathematical convention. It stands at the top of `kfactk.samples`. A curvature,
a basis and a link derive from their base class and inherit its defaults. Any other stage is an
object of a class with the members of its protocol. Our stages are frozen attrs classes whose fields
are their options. A stage holds no state and calls no collective: the framework hands it tensors,
and keeps, averages, reduces and saves what it returns.
"""

from kfactk.stages.basis import (
    WAIVABLE as WAIVABLE,
    Basis as Basis,
    Decomposition as Decomposition,
    FactorContext as FactorContext,
)
from kfactk.stages.clip import Clip as Clip, Dot as Dot, GradientPair as GradientPair
from kfactk.stages.controller import (
    Controller as Controller,
    ControlRates as ControlRates,
    QuadraticModel as QuadraticModel,
)
from kfactk.stages.curvature import Curvature as Curvature, GradientCurvature as GradientCurvature
from kfactk.stages.fisher import Fisher as Fisher
from kfactk.stages.layer import (
    InnerCall as InnerCall,
    Layer as Layer,
    ModuleCall as ModuleCall,
    Replay as Replay,
    Replayed as Replayed,
    Tensors as Tensors,
    owner_of as owner_of,
    parameter_at as parameter_at,
)
from kfactk.stages.likelihood import Likelihood as Likelihood
from kfactk.stages.link import (
    Link as Link,
    LinkedLayer as LinkedLayer,
    Preparation as Preparation,
    Prepared as Prepared,
)
from kfactk.stages.pace import Pace as Pace
from kfactk.stages.placement import Placement as Placement
from kfactk.stages.tracker import Tracker as Tracker
from kfactk.stages.update import Update as Update
