"""Registries of mmstrip: children of mmengine's, so that every toolbox finds ``mmstrip.X`` without custom imports.

``locations`` are imported on the first lookup of a name with the scope ``mmstrip``.
"""

from importlib import import_module

from mmengine import registry as mmengine
from mmengine.registry import Registry


class LazyRegistry(Registry):
    """A registry whose packages have lazy attributes: a lookup imports only the module of that name.

    Each dataset needs a toolbox, and toolboxes take seconds to import.
    """

    def get(self, key: str) -> type | None:
        name = key.removeprefix(f'{self.scope}.')
        for location in self._locations:
            package = import_module(location)
            if name in package.__all__:
                getattr(package, name)  # importing its module registers it
        return super().get(key)


def _child(parent: str, *locations: str, kind: type = Registry) -> Registry:
    parent = getattr(mmengine, parent)
    return kind(parent.name, parent=parent, scope='mmstrip', locations=list(locations))


MODELS = _child('MODELS', 'mmstrip.models')
DATASETS = _child('DATASETS', 'mmstrip.datasets', kind=LazyRegistry)
TRANSFORMS = _child('TRANSFORMS', 'mmstrip.datasets', kind=LazyRegistry)
HOOKS = _child('HOOKS', 'mmstrip.engine')
LOOPS = _child('LOOPS', 'mmstrip.engine')
OPTIM_WRAPPERS = _child('OPTIM_WRAPPERS', 'mmstrip.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child('OPTIM_WRAPPER_CONSTRUCTORS', 'mmstrip.engine')
DATA_SAMPLERS = _child('DATA_SAMPLERS', 'mmstrip.engine')
FUNCTIONS = _child('FUNCTIONS', 'mmstrip.engine')

# Configs that inherit ours get the scope mmstrip; mmengine warns about registries without a child of that scope.
for _name in (
    *('EVALUATOR', 'LOG_PROCESSORS', 'METRICS', 'MODEL_WRAPPERS', 'OPTIMIZERS', 'PARAM_SCHEDULERS', 'RUNNERS'),
    *('VISBACKENDS', 'VISUALIZERS'),
):
    _child(_name, 'mmstrip.registry')
