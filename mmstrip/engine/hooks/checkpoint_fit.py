"""A check that a checkpoint belongs to the training that is about to take it."""

import inspect
from collections.abc import Iterator

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.checkpoints import load_whole, name_as, weights_in
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
    """Refuse a checkpoint that does not fit a training, and say what of a config a resumed run does not apply.

    A run is resumed only with the model, classes, optimizer, groups of parameters and kinds of schedules that it was
    saved with, as mmengine would draw the rest at random or mix up the states. What it takes over in spite of the
    config (learning rate, schedule), and what the config changes while the rest stays (images, batches, epochs), is a
    warning. A test needs all tensors of its model, a training from ``load_from`` one of them; mmengine warns of others.

    Raises:
        ValueError: The checkpoint does not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook loads its part

    def __init__(self):
        self.problem = ''  # of a test

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta']['training'] = _training(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = unwrap_model(runner.model)
        weights = checkpoint['state_dict'] = name_as(model, weights_in(checkpoint))
        if not runner._resume:
            if not weights.keys() & model.state_dict().keys():
                first = f'; its first keys are {", ".join(list(weights)[:5])}' if weights else ''
                count = len(model.state_dict())
                raise ValueError(f"{runner._load_from} holds none of the model's {count} tensors{first}")
            self.problem = load_whole(model, weights)
            return
        checkpoint['meta'].pop('config', None)  # text that mmengine would run
        problem = _mismatch(runner, checkpoint)
        if problem:
            raise ValueError(
                f'{runner._load_from} cannot be resumed with this config: {problem}. To start a new training from its '
                'weights, give it as load_from, without --resume'
            )
        differences = [*_changes(runner, checkpoint), *_kept(runner, checkpoint)]
        if differences:
            runner.logger.warning(
                f'This config differs from that of {runner._load_from}:\n'
                + ''.join(f'  - {line}\n' for line in differences)
                + 'To train by this config alone, start a new training from these weights: load_from, without --resume'
            )

    def before_train(self, runner: Runner) -> None:
        self.problem = ''

    def before_test(self, runner: Runner) -> None:
        if self.problem:
            raise ValueError(f'the checkpoint {self.problem}')


def _training(runner: Runner) -> dict:
    """Of a run's data, loop and optimizers, in plain values; None for what is not known."""
    loader, wrappers = runner.train_dataloader, wrappers_by_name(runner.optim_wrapper)
    return dict(
        unit='epochs' if isinstance(runner.train_loop, EpochBasedTrainLoop) else 'iterations',
        images=len(loader.dataset) if hasattr(loader.dataset, '__len__') else None,
        batch_size=loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None),
        processes=get_world_size(),
        accumulated=getattr(next(iter(wrappers.values())), '_accumulative_counts', None),
        optimizers={name: type(wrapper.optimizer).__name__ for name, wrapper in wrappers.items()},
    )


def _saved_training(checkpoint: dict) -> dict:
    """Of the run that was saved; nothing if it was one of mmengine's own tools, or of an older version."""
    return checkpoint['meta'].get('training') or {}


def _mismatch(runner: Runner, checkpoint: dict) -> str:
    """What of a checkpoint does not fit the run, as a sentence; '' if nothing."""
    own, averages = unwrap_model(runner.model).state_dict(), checkpoint.get('ema_state_dict')
    if problem := _other_tensors(own, checkpoint['state_dict']) or _other_classes(runner, checkpoint['meta']):
        return problem
    if averages is not None:
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            return 'it holds averaged weights, and this config has no EMAHook'
        averages = {key[7:]: value for key, value in averages.items() if key.startswith('module.')}
        if problem := _other_tensors(own, averages):
            return problem
    then, now = _saved_training(checkpoint).get('unit'), _training(runner)['unit']
    if then not in (None, now):
        return f'it was trained by {then}, this config trains by {now}'
    return _other_schedules(runner, checkpoint) or _other_optimizers(runner, checkpoint)


def _other_tensors(own: dict, found: dict) -> str:
    for words, keys in (('lacks', own.keys() - found.keys()), ('has, unlike the model,', found.keys() - own.keys())):
        if keys:
            first = [str(key) for key in (*own, *found) if key in keys][:3]
            return f'it {words} {len(keys)} tensors: {", ".join(first)}' + (', ...' if len(keys) > 3 else '')
    for key, value in own.items():
        shape = getattr(found[key], 'shape', None)
        if isinstance(value, Tensor) and shape != value.shape:
            return f'{key} has shape {shape and tuple(shape)} there and {tuple(value.shape)} in the model'
    return ''


def _other_classes(runner: Runner, meta: dict) -> str:
    found = (meta.get('dataset_meta') or {}).get('classes')
    own = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
    if found is not None and own is not None and list(found) != list(own):
        return f'its classes are {_shown(found)}, those of the training data are {_shown(own)}'
    return ''


def _shown(classes) -> str:
    names = list(map(str, classes))
    return ', '.join(names[:5]) + (f', ... ({len(names)})' if len(names) > 5 else '')


def _schedulers(schedulers) -> dict[str, object]:
    """Schedulers, or their states, of one optimizer or of several by name."""
    named = schedulers if isinstance(schedulers, dict) else {'': schedulers or []}
    return {f'param_scheduler[{i}] {name}'.strip(): one for name, part in named.items() for i, one in enumerate(part)}


def _other_schedules(runner: Runner, checkpoint: dict) -> str:
    own, saved = _schedulers(runner.param_schedulers), _schedulers(checkpoint.get('param_schedulers'))
    if own and own.keys() != saved.keys():
        return f'it has {len(saved)} param_schedulers, the config has {len(own)}'
    for place, scheduler in own.items():
        found = saved[place]
        if not _settings_of(scheduler).keys() <= found.keys() or found.get('param_name') != scheduler.param_name:
            return f'its {place} is not a {type(scheduler).__name__}'
    return ''


def _settings_of(scheduler) -> dict:
    """What a config can set of a scheduler, and its values."""
    names = {name for kind in type(scheduler).__mro__ for name in inspect.signature(kind.__init__).parameters}
    return {key: value for key, value in scheduler.state_dict().items() if key in names - _NO_SETTINGS}


def _other_optimizers(runner: Runner, checkpoint: dict) -> str:
    kinds, saved = _saved_training(checkpoint).get('optimizers') or {}, checkpoint.get('param_schedulers')
    for name, wrapper in wrappers_by_name(runner.optim_wrapper).items():
        optimizer, state = wrapper.optimizer, _state(checkpoint, name)
        if not state.get('param_groups'):
            return f'it has no state of the optimizer {name}'.rstrip()
        regroup(state, (saved.get(name) if name else saved) or [], wrapper, unwrap_model(runner.model))
        own, groups = optimizer.param_groups, state['param_groups']
        then, now = kinds.get(name), type(optimizer).__name__
        if then not in (None, now) or _settings(own[0]) != _settings(groups[0]):
            return f'its optimizer is {"another one" if then in (None, now) else then}, that of the config is {now}'
        sizes = [[len(group['params']) for group in part] for part in (groups, own)]
        if sizes[0] != sizes[1]:
            then, now = (f'{sum(part)} parameters in {len(part)} groups' for part in sizes)
            return f'its optimizer has {then}, that of the config has {now}' + (', in another order' * (then == now))
        if not _states_fit(state.get('state', {}), groups, optimizer):
            return 'the state of its optimizer is of other parameters, or of these in another order'
    return ''


def _state(checkpoint: dict, name: str) -> dict:
    return checkpoint['optimizer'].get(name) or {} if name else checkpoint['optimizer']


def _settings(group: dict) -> set[str]:
    """Of an optimizer; without flags, which differ between versions of PyTorch."""
    flags = {key for key, value in group.items() if isinstance(value, (bool, type(None)))}
    return {key for key in group if key not in flags | _NO_SETTINGS and not key.startswith('initial_')}


def _states_fit(states: dict, groups: list[dict], optimizer: torch.optim.Optimizer) -> bool:
    indices = [index for group in groups for index in group['params']]
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    return all(
        value.shape == parameter.shape
        for index, parameter in zip(indices, parameters)
        for value in states.get(index, {}).values()
        if isinstance(value, Tensor) and value.dim() == parameter.dim()  # some optimizers have values of fewer axes
    )


def _changes(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """What the config changes from here on."""
    meta, now = checkpoint['meta'], _training(runner)
    for key, words in _DATA.items():
        before = _saved_training(checkpoint).get(key)
        if None not in (before, now[key]) and before != now[key]:
            yield f'{before} {words} so far, {now[key]} from here on; learning rate and schedule are not adapted'
    name, done = ('max_epochs', meta['epoch']) if now['unit'] == 'epochs' else ('max_iters', meta['iter'])
    before, end = checkpoint['message_hub']['runtime_info'].get(name), getattr(runner, name, None)
    if None not in (before, end) and before != end:
        goes_on = 'the training goes on to that, by the schedule of the checkpoint'
        yield f'{name} was {before} and is {end}: {goes_on if end > done else "nothing is left to do"}'
    if checkpoint.get('param_schedulers') and not runner.param_schedulers:
        yield 'the config has no param_scheduler: learning rates stay where the schedule of the checkpoint left them'
    if any(isinstance(hook, EMAHook) for hook in runner.hooks) and 'ema_state_dict' not in checkpoint:
        yield 'the checkpoint has no averaged weights: the average (EMA) starts from its weights'


def _kept(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """What the checkpoint sets in the place of the config."""
    words = '{} in the config is not applied, the training goes on with {}'
    for name, wrapper in wrappers_by_name(runner.optim_wrapper).items():
        pairs = list(zip(wrapper.optimizer.param_groups, _state(checkpoint, name)['param_groups']))
        for key in sorted(pairs[0][0].keys() & pairs[0][1].keys() - _NO_SETTINGS):
            values = [tuple(group.get(f'initial_{key}', group.get(key)) for group in pair) for pair in pairs]
            other = [pair for pair in values if pair[0] != pair[1]]
            if other and not key.startswith('initial_'):
                groups = f' ({len(other)} of {len(pairs)} groups of parameters)' if len(pairs) > 1 else ''
                yield f'{key} of the optimizer {name}'.rstrip() + f': {words.format(*other[0])}{groups}'
    saved = _schedulers(checkpoint.get('param_schedulers'))
    for place, scheduler in _schedulers(runner.param_schedulers).items():
        for key, value in _settings_of(scheduler).items():
            if saved[place][key] != value:
                yield f'{key} of {place} ({type(scheduler).__name__}): {words.format(value, saved[place][key])}'
