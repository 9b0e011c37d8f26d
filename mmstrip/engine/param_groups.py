"""Parameter groups by settings, where mmengine makes one group per parameter."""

import inspect
from collections.abc import Callable

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .host_copy import HostCopy

_APPLIED = ('params', 'param_names', 'lr_mult', 'decay_mult')  # no settings: lr and weight_decay include them
_PER_GROUP = ('base_values', '_last_value')  # lists in a parameter scheduler's state


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with one parameter group for all parameters of equal settings.

    An optimizer updates the parameters of a group together, so hundreds of groups cost thousands of kernel launches per
    step on a GPU. Each group lists its parameters under ``param_names``. On CUDA, optimizers with a fused
    implementation use it unless the config sets ``fused`` or ``foreach``, and the log shows the gradient norm of the
    previous step.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        if self._can_fuse(model):
            self.optimizer_cfg = dict(self.optimizer_cfg, fused=True)
        wrapper = super().__call__(model)
        if getattr(wrapper, 'clip_grad_kwargs', None):
            wrapper.clip_func = _Clip(wrapper.clip_func)
        return wrapper

    def _can_fuse(self, model: nn.Module) -> bool:
        name = kind = self.optimizer_cfg['type']
        if isinstance(kind, str):
            with OPTIMIZERS.switch_scope_and_registry(None) as registry:
                kind = registry.get(name)
        if kind is None:
            raise ValueError(f'optim_wrapper.optimizer.type: no optimizer is registered as {name!r}')
        undecided = not {'fused', 'foreach', 'differentiable'} & set(self.optimizer_cfg)
        known = 'fused' in inspect.signature(kind).parameters
        return undecided and known and all(p.is_cuda and p.is_floating_point() for p in model.parameters())

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        super().add_params(params, module, prefix=prefix, **kwargs)
        if not prefix:  # the call for the whole model
            self.adjust(params, module)
            defaults = {key: self.optimizer_cfg[key] for key in ('lr', 'weight_decay') if key in self.optimizer_cfg}
            params[:] = merge_groups([defaults | group for group in params], module)

    def adjust(self, params: list[dict], model: nn.Module) -> None:
        """Change the settings of the groups, each of one parameter, before they are merged."""


class _Clip:
    """Clips gradients and returns their norm; on CUDA that of the previous step, to avoid waiting for the GPU."""

    def __init__(self, clip: Callable):
        self.clip, self.copy = clip, None  # such as torch.nn.utils.clip_grad_norm_; the norm on its way to the host

    def __call__(self, parameters: list[nn.Parameter], **options) -> float | Tensor | None:
        norm = self.clip(parameters, **options)
        if norm is None or not _is_on_gpu(norm):
            return norm
        before, self.copy = self.copy, HostCopy(norm[None])
        return None if before is None else before.read()[0]


def _is_on_gpu(norm: Tensor) -> bool:
    return norm.is_cuda


def wrappers_by_name(optim_wrapper: OptimWrapper | OptimWrapperDict) -> dict[str, OptimWrapper]:
    """The wrapper of each optimizer by name; a single optimizer has the name ''."""
    return dict(optim_wrapper.items()) if isinstance(optim_wrapper, OptimWrapperDict) else {'': optim_wrapper}


def merge_groups(groups: list[dict], model: nn.Module) -> list[dict]:
    """Merge groups with equal settings, in the order of their first parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    merged: list[dict] = []
    for group in groups:
        settings = _settings(group)
        same = next((other for other in merged if other['settings'] == settings), None)
        if same is None:
            same = dict(settings=settings, params=[])
            merged.append(same)
        same['params'] += group['params']
    return [
        dict(group['settings'], params=group['params'], param_names=[names[id(p)] for p in group['params']])
        for group in merged
    ]


def _settings(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in _APPLIED}


def regroup(state: dict, schedulers: list[dict], optim_wrapper: OptimWrapper, model: nn.Module) -> None:
    """Convert optimizer and scheduler states with one group per parameter to the wrapper's merged groups, in place.

    States whose groups differ in other ways stay as they are. ``model`` is the one in training, without wrappers.
    """
    groups, saved = optim_wrapper.optimizer.param_groups, state['param_groups']
    named = {name for group in groups for name in group.get('param_names', ())}
    order = [name for name, _ in model.named_parameters() if name in named]
    if len(saved) == len(groups) or [len(group['params']) for group in saved] != [1] * len(order):
        return
    places = [[order.index(name) for name in group['param_names']] for group in groups]
    if any(_settings(saved[i]) != _settings(saved[place[0]]) for place in places for i in place):
        return
    state['param_groups'] = [
        dict(
            _settings(saved[place[0]]), params=[saved[i]['params'][0] for i in place], param_names=group['param_names']
        )
        for place, group in zip(places, groups)
    ]
    firsts = [place[0] for place in places] + [len(saved)]  # the last one is the wrapper's base_param_settings
    if optim_wrapper.base_param_settings is None:
        state.pop('base_param_settings', None)
        del firsts[-1]
    for scheduler in schedulers:
        for key in _PER_GROUP:
            if len(scheduler.get(key) or ()) == len(saved) + 1:
                scheduler[key] = [scheduler[key][i] for i in firsts]
