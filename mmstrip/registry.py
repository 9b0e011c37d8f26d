"""Registries of mmstrip: children of mmengine's, so that every toolbox finds ``mmstrip.X`` without custom imports.

``locations`` are imported on the first look-up of a ``mmstrip.`` name.
"""

from importlib import import_module

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import (
    EVALUATOR,
    LOG_PROCESSORS,
    METRICS,
    MODEL_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    RUNNERS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS


class LazyRegistry(Registry):
    """A registry of packages whose names are lazy attributes: a look-up imports the module of that name alone.

    Each dataset needs a toolbox, and the toolboxes take seconds to import.
    """

    def get(self, key: str) -> type | None:
        name = key.removeprefix(f'{self.scope}.')
        for location in self._locations:
            package = import_module(location)
            if name in package.__all__:
                getattr(package, name)  # whose module registers it
        return super().get(key)


MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmstrip', locations=['mmstrip.models'])
DATASETS = LazyRegistry('dataset', parent=MMENGINE_DATASETS, scope='mmstrip', locations=['mmstrip.datasets'])
TRANSFORMS = LazyRegistry('transform', parent=MMENGINE_TRANSFORMS, scope='mmstrip', locations=['mmstrip.datasets'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmstrip', locations=['mmstrip.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mmstrip', locations=['mmstrip.engine'])
OPTIM_WRAPPERS = Registry(
    'optim wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmstrip', locations=['mmstrip.engine']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim wrapper constructor', parent=MMENGINE_CONSTRUCTORS, scope='mmstrip', locations=['mmstrip.engine']
)
DATA_SAMPLERS = Registry(
    'data sampler', parent=MMENGINE_DATA_SAMPLERS, scope='mmstrip', locations=['mmstrip.utils.seeding']
)
FUNCTIONS = Registry('function', parent=MMENGINE_FUNCTIONS, scope='mmstrip', locations=['mmstrip.utils.seeding'])

# What else mmengine builds from configs that inherit ours, as it gives them our scope; else it warns.
OTHERS = (
    EVALUATOR,
    LOG_PROCESSORS,
    METRICS,
    MODEL_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    RUNNERS,
    VISBACKENDS,
    VISUALIZERS,
)
for _parent in OTHERS:
    Registry(_parent.name, parent=_parent, scope='mmstrip', locations=['mmstrip.registry'])
