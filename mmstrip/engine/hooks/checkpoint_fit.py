"""A check that a checkpoint fits the training or test that loads it."""

import inspect
from collections.abc import Iterator

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.checkpoints import load_full_state_dict, match_keys, weights_in
from ...utils.wrappers import unwrap_model
from ..param_groups import regroup, wrappers_by_name

_DATA = {
    'images': 'training images',
    'batch_size': 'images per batch and process',
    'processes': 'processes',
    'accumulated': 'accumulated batches',
}
_NO_SETTINGS = {'params', 'param_names', 'last_step', 'verbose'}


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Reject a checkpoint that does not fit a run, and warn about config settings that a resumed run ignores.

    A run resumes only with the model, classes, optimizer, parameter groups and types of schedulers that it was saved
    with; mmengine would initialize the rest at random or mix up states. A warning lists what the checkpoint overrides
    (learning rate, schedule) and what the config changes (images, batches, epochs). A test needs all tensors of its
    model, a training from ``load_from`` at least one; mmengine warns about the others.

    Raises:
        ValueError: The checkpoint does not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook loads its weights

    def __init__(self):
        self.problem = ''  # an error if a test follows

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta']['training'] = _training_settings(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = unwrap_model(runner.model)
        weights = checkpoint['state_dict'] = match_keys(model, weights_in(checkpoint))
        if not runner._resume:
            if not weights.keys() & model.state_dict().keys():
                first = f'; its first keys are {", ".join(list(weights)[:5])}' if weights else ''
                count = len(model.state_dict())
                raise ValueError(f"{runner._load_from} contains none of the model's {count} tensors{first}")
            self.problem = load_full_state_dict(model, weights)
            return
        checkpoint['meta'].pop('config', None)  # source text that mmengine would execute
        problem = _mismatch(runner, checkpoint)
        if problem:
            raise ValueError(
                f'{runner._load_from} cannot be resumed with this config: {problem}. To start a new training from its '
                'weights, set load_from to it and leave out --resume'
            )
        differences = [*_changes(runner, checkpoint), *_ignored_settings(runner, checkpoint)]
        if differences:
            runner.logger.warning(
                f'This config differs from that of {runner._load_from}:\n'
                + ''.join(f'  - {line}\n' for line in differences)
                + 'To train with this config only, start a new training from these weights: load_from, without --resume'
            )

    def before_train(self, runner: Runner) -> None:
        self.problem = ''

    def before_test(self, runner: Runner) -> None:
        if self.problem:
            raise ValueError(f'{runner._load_from} does not fit the model: it {self.problem}')


def _training_settings(runner: Runner) -> dict:
    """Settings of a run's data, loop and optimizers as plain values; None if unknown."""
    loader, wrappers = runner.train_dataloader, wrappers_by_name(runner.optim_wrapper)
    return dict(
        unit='epochs' if isinstance(runner.train_loop, EpochBasedTrainLoop) else 'iterations',
        images=len(loader.dataset) if hasattr(loader.dataset, '__len__') else None,
        batch_size=loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None),
        processes=get_world_size(),
        accumulated=getattr(next(iter(wrappers.values())), '_accumulative_counts', None),
        optimizers={name: type(wrapper.optimizer).__name__ for name, wrapper in wrappers.items()},
    )


def _saved_settings(checkpoint: dict) -> dict:
    """The settings of the saved run; empty if mmengine's own tools or an older version saved it."""
    return checkpoint['meta'].get('training') or {}


def _mismatch(runner: Runner, checkpoint: dict) -> str:
    """What in a checkpoint does not fit the run, as a clause; '' if nothing."""
    own, averages = unwrap_model(runner.model).state_dict(), checkpoint.get('ema_state_dict')
    if problem := _tensor_mismatch(own, checkpoint['state_dict']) or _class_mismatch(runner, checkpoint['meta']):
        return problem
    if averages is not None:
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            return 'it contains averaged weights, but this config has no EMAHook'
        averages = {key[7:]: value for key, value in averages.items() if key.startswith('module.')}
        if problem := _tensor_mismatch(own, averages):
            return problem
    then, now = _saved_settings(checkpoint).get('unit'), _training_settings(runner)['unit']
    if then not in (None, now):
        return f'it was trained by {then}, but this config trains by {now}'
    return _scheduler_mismatch(runner, checkpoint) or _optimizer_mismatch(runner, checkpoint)


def _tensor_mismatch(own: dict, found: dict) -> str:
    missing, unexpected = own.keys() - found.keys(), found.keys() - own.keys()
    for words, keys in ((f'lacks {len(missing)}', missing), (f'has {len(unexpected)} unexpected', unexpected)):
        if keys:
            first = [str(key) for key in (*own, *found) if key in keys][:3]
            return f'it {words} tensors: {", ".join(first)}' + (', ...' if len(keys) > 3 else '')
    for key, value in own.items():
        shape = getattr(found[key], 'shape', None)
        if isinstance(value, Tensor) and shape != value.shape:
            return f'{key} has shape {shape and tuple(shape)} in the checkpoint, but {tuple(value.shape)} in the model'
    return ''


def _class_mismatch(runner: Runner, meta: dict) -> str:
    found = (meta.get('dataset_meta') or {}).get('classes')
    own = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
    if found is not None and own is not None and list(found) != list(own):
        return f'its classes are {_shown(found)}, but those of the training data are {_shown(own)}'
    return ''


def _shown(classes) -> str:
    names = list(map(str, classes))
    return ', '.join(names[:5]) + (f', ... ({len(names)})' if len(names) > 5 else '')


def _schedulers(schedulers) -> dict[str, object]:
    """Schedulers, or their states, of one optimizer or of several by name."""
    named = schedulers if isinstance(schedulers, dict) else {'': schedulers or []}
    return {f'param_scheduler[{i}] {name}'.strip(): one for name, part in named.items() for i, one in enumerate(part)}


def _scheduler_mismatch(runner: Runner, checkpoint: dict) -> str:
    own, saved = _schedulers(runner.param_schedulers), _schedulers(checkpoint.get('param_schedulers'))
    if own and own.keys() != saved.keys():
        return f'it has {len(saved)} parameter schedulers, but the config has {len(own)}'
    for place, scheduler in own.items():
        found = saved[place]
        if not _settings_of(scheduler).keys() <= found.keys() or found.get('param_name') != scheduler.param_name:
            return f'its {place} is not the {type(scheduler).__name__} of the config'
    return ''


def _settings_of(scheduler) -> dict:
    """The settings of a scheduler that a config can change, and their values."""
    names = {name for kind in type(scheduler).__mro__ for name in inspect.signature(kind.__init__).parameters}
    return {key: value for key, value in scheduler.state_dict().items() if key in names - _NO_SETTINGS}


def _optimizer_mismatch(runner: Runner, checkpoint: dict) -> str:
    kinds, saved = _saved_settings(checkpoint).get('optimizers') or {}, checkpoint.get('param_schedulers')
    for name, wrapper in wrappers_by_name(runner.optim_wrapper).items():
        optimizer, state = wrapper.optimizer, _state(checkpoint, name)
        if not state.get('param_groups'):
            return f'it has no state of the optimizer {name}'.rstrip()
        regroup(state, (saved.get(name) if name else saved) or [], wrapper, unwrap_model(runner.model))
        own, groups = optimizer.param_groups, state['param_groups']
        then, now = kinds.get(name), type(optimizer).__name__
        if then not in (None, now) or _settings(own[0]) != _settings(groups[0]):
            return f'its optimizer is {"another one" if then in (None, now) else then}, but the config has {now}'
        sizes = [[len(group['params']) for group in part] for part in (groups, own)]
        if sizes[0] != sizes[1]:
            then, now = (f'{sum(part)} parameters in {len(part)} groups' for part in sizes)
            return f'its optimizer has {then}, but that of the config has {now}' + ', in another order' * (then == now)
        if not _states_fit(state.get('state', {}), groups, optimizer):
            return 'its optimizer state belongs to other parameters, or to these in another order'
    return ''


def _state(checkpoint: dict, name: str) -> dict:
    return checkpoint['optimizer'].get(name) or {} if name else checkpoint['optimizer']


def _settings(group: dict) -> set[str]:
    """Settings of an optimizer, without flags, which differ between PyTorch versions."""
    flags = {key for key, value in group.items() if isinstance(value, (bool, type(None)))}
    return {key for key in group if key not in flags | _NO_SETTINGS and not key.startswith('initial_')}


def _states_fit(states: dict, groups: list[dict], optimizer: torch.optim.Optimizer) -> bool:
    indices = [index for group in groups for index in group['params']]
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    return all(
        value.shape == parameter.shape
        for index, parameter in zip(indices, parameters)
        for value in states.get(index, {}).values()
        if isinstance(value, Tensor) and value.dim() == parameter.dim()  # some optimizers have states of fewer axes
    )


def _changes(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """What the config changes in the rest of the training."""
    meta, now = checkpoint['meta'], _training_settings(runner)
    for key, words in _DATA.items():
        before = _saved_settings(checkpoint).get(key)
        if None not in (before, now[key]) and before != now[key]:
            yield f'{words}: {before} so far, {now[key]} from here on; learning rate and schedule are not adapted'
    name, done = ('max_epochs', meta['epoch']) if now['unit'] == 'epochs' else ('max_iters', meta['iter'])
    before, end = checkpoint['message_hub']['runtime_info'].get(name), getattr(runner, name, None)
    if None not in (before, end) and before != end:
        rest = 'training continues with the schedule of the checkpoint' if end > done else 'nothing is left to do'
        yield f'{name} was {before} and is now {end}: {rest}'
    if checkpoint.get('param_schedulers') and not runner.param_schedulers:
        yield 'the config has no param_scheduler: learning rates keep their values in the checkpoint'
    if any(isinstance(hook, EMAHook) for hook in runner.hooks) and 'ema_state_dict' not in checkpoint:
        yield 'the checkpoint has no averaged weights: the average (EMA) starts from its weights'


def _ignored_settings(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """What the checkpoint sets instead of the config."""
    words = '{} in the config is ignored, training continues with {}'
    for name, wrapper in wrappers_by_name(runner.optim_wrapper).items():
        pairs = list(zip(wrapper.optimizer.param_groups, _state(checkpoint, name)['param_groups']))
        for key in sorted(pairs[0][0].keys() & pairs[0][1].keys() - _NO_SETTINGS):
            values = [tuple(group.get(f'initial_{key}', group.get(key)) for group in pair) for pair in pairs]
            other = [pair for pair in values if pair[0] != pair[1]]
            if other and not key.startswith('initial_'):
                groups = f' ({len(other)} of {len(pairs)} parameter groups)' if len(pairs) > 1 else ''
                yield f'{key} of the optimizer {name}'.rstrip() + f': {words.format(*other[0])}{groups}'
    saved = _schedulers(checkpoint.get('param_schedulers'))
    for place, scheduler in _schedulers(runner.param_schedulers).items():
        for key, value in _settings_of(scheduler).items():
            if saved[place][key] != value:
                yield f'{key} of {place} ({type(scheduler).__name__}): {words.format(value, saved[place][key])}'
