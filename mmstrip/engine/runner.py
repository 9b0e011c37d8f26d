"""mmengine's Runner with checks where it would fail silently."""

import logging
from collections.abc import Sequence
from functools import partial, reduce

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import MODEL_WRAPPERS, OPTIM_WRAPPERS, RUNNERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..utils.samples import read_sample
from .loops import check_batches
from .param_groups import wrappers_by_name
from .precision import BFloat16OptimWrapper


def runner_class(name: str | None = None, scope: str | None = None) -> type[Runner]:
    """The Runner registered as ``name`` in a config's scope, mmengine's own by default, as a :class:`_CheckedRunner`.

    Raises:
        ValueError: No Runner has this name.
    """
    kind = Runner
    if name is not None:
        with RUNNERS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(name)
        if kind is None:
            raise ValueError(f'runner_type: no Runner is registered as {name!r}')
    return type(kind.__name__, (_CheckedRunner, kind), {})


def _checked(loop: BaseLoop, key: str) -> BaseLoop:
    """The loop, once its loader, if it has one, is known to give batches."""
    check_batches(getattr(loop, 'dataloader', None), key)
    return loop


def _compare_classes(loop: BaseLoop, model: nn.Module) -> None:
    """Warn of classes without an output: some losses ignore them, others fail on GPUs without a reason.

    Not an error, because some models change the labels, such as RPN, or take classes from a text.
    """
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    about = getattr(dataset, 'metainfo', None) or {}
    classes = about.get('thing_classes') or about.get('classes')  # panoptic models find stuff by other heads
    model = model.module if is_model_wrapper(model) else model
    for name in ('head', 'decode_head', 'bbox_head', 'roi_head.bbox_head'):
        head = reduce(lambda part, attribute: getattr(part, attribute, None), name.split('.'), model)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            count = getattr(part, 'num_classes', None)
            if isinstance(classes, Sequence) and isinstance(count, int) and count < len(classes):
                words = f'model.{name}.num_classes is {count}, but train_dataloader.dataset has {len(classes)} classes'
                print_log(words, logger='current', level=logging.WARNING)


def _read_samples(dataset: Dataset, indices: list) -> list:
    return [read_sample(dataset, index) for index in indices]


class _CheckedRunner:
    """Mixin for a Runner.

    - On CPUs, several processes train with any model wrapper, and with BN in place of SyncBN.
    - ``--auto-scale-lr`` also scales the learning rate that is logged as ``base_lr``.
    - A model with fewer outputs than the training data have classes is named in a warning.
    - Data errors name the file at fault, see :func:`mmstrip.utils.samples.read_sample`; in training,
      :class:`mmstrip.engine.sampler.SeededSampler` does this.

    Raises:
        ValueError: A loader gives no batch, or the optim wrapper's constructor ignores mixed precision.
    """

    def build_dataloader(self, dataloader, *args, **kwargs) -> DataLoader:
        loader = super().build_dataloader(dataloader, *args, **kwargs)
        dataset = getattr(loader, 'dataset', None)
        if hasattr(dataset, '__dict__'):  # unlike a list
            # DataLoader's workers call this to fetch a batch; the training's sampler has set its own.
            vars(dataset).setdefault('__getitems__', partial(_read_samples, dataset))
        return loader

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if not self.distributed or torch.cuda.is_available() or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        layers = list(model.modules())
        model = revert_sync_batchnorm(model)
        sync_bn = self.cfg.pop('sync_bn', None)
        if sync_bn or any(layer is not before for layer, before in zip(model.modules(), layers)):
            print_log(
                'SyncBN is not available on CPUs: each process keeps its own BN statistics in training',
                logger='current',
            )
        find_unused = self.cfg.get('find_unused_parameters', False)
        default = dict(type='MMDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=find_unused)
        config = {'type': default['type'], **model_wrapper_cfg} if model_wrapper_cfg else default
        kind = config['type']
        kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
            config |= dict(device_ids=None, output_device=None)
        try:
            return super().wrap_model(config, model)
        finally:
            if sync_bn is not None:  # for a run that resumes on GPUs
                self.cfg.sync_bn = sync_bn

    def build_optim_wrapper(self, optim_wrapper):
        asked = optim_wrapper.get('type') if isinstance(optim_wrapper, dict) else None
        asked = OPTIM_WRAPPERS.get(asked) if isinstance(asked, str) else asked
        built = super().build_optim_wrapper(optim_wrapper)
        mixed = isinstance(asked, type) and issubclass(asked, (AmpOptimWrapper, BFloat16OptimWrapper))
        for wrapper in wrappers_by_name(built).values():
            if mixed and not isinstance(wrapper, asked):
                raise ValueError(
                    f'optim_wrapper.constructor {optim_wrapper.get("constructor")!r} built {type(wrapper).__name__}, '
                    f'not {asked.__name__}, and would train in float32. Make it build the type in its argument '
                    'optim_wrapper_cfg, or leave out --amp'
                )
        return built

    def scale_lr(self, optim_wrapper, auto_scale_lr: dict | None = None) -> None:
        # A group without parameters, which schedulers update and logs show; mmengine does not scale it.
        wrappers = wrappers_by_name(optim_wrapper).values()
        unscaled = [wrapper for wrapper in wrappers if getattr(wrapper, 'base_param_settings', None)]
        for wrapper in unscaled:
            wrapper.optimizer.param_groups.append(wrapper.base_param_settings)
        try:
            super().scale_lr(optim_wrapper, auto_scale_lr)
        finally:
            for wrapper in unscaled:
                wrapper.optimizer.param_groups.pop()
        if (auto_scale_lr or {}).get('enable') and 'OneCycleLR' in str(self.param_schedulers):
            print_log(
                'OneCycleLR takes its learning rate from eta_max, which --auto-scale-lr does not scale',
                logger='current',
                level=logging.WARNING,
            )

    def build_train_loop(self, loop):
        built = super().build_train_loop(loop)  # infinite samplers of other loops fill any batch
        _compare_classes(built, self.model)
        return _checked(built, 'train_dataloader') if isinstance(built, EpochBasedTrainLoop) else built

    def build_val_loop(self, loop):
        return _checked(super().build_val_loop(loop), 'val_dataloader')

    def build_test_loop(self, loop):
        return _checked(super().build_test_loop(loop), 'test_dataloader')
