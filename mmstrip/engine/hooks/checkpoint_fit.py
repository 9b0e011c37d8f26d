"""A check that a checkpoint belongs to the training that is about to take it."""

import inspect
from collections.abc import Iterator

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.checkpoints import name_as, weights_in
from ...utils.plain_values import to_plain
from ...utils.wrappers import unwrap_model
from ..param_groups import regroup, wrappers_by_name

_DATA = {
    'images': 'training images',
    'batch_size': 'images per batch and process',
    'processes': 'processes',
    'accumulated': 'accumulated batches',
}
_NO_SETTINGS = {'params', 'last_step', 'verbose'}


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuse a checkpoint that does not fit a training, and say what of a config a resumed run does not apply.

    A run is resumed only with the model, classes, optimizer, groups of parameters and kinds of schedules that it was
    saved with, as mmengine would draw the rest at random or mix up the states. What it takes over in spite of the
    config (learning rate, schedule), and what the config changes while the rest stays (images, batches, epochs), is a
    warning.

    Raises:
        ValueError: The checkpoint to resume does not fit, or ``load_from`` has none of the model's tensors.
    """

    priority = 'VERY_HIGH'  # before EMAHook loads its part

    def __init__(self):
        self.foreign = ''

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'].update(
            training=_training(runner),
            optimizers={
                name: type(wrapper.optimizer).__name__
                for name, wrapper in wrappers_by_name(runner.optim_wrapper).items()
            },
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = unwrap_model(runner.model)
        weights = name_as(model, weights_in(checkpoint))
        checkpoint['state_dict'] = weights
        self.foreign = ''
        if not runner._resume:
            if not set(weights) & set(model.state_dict()):
                first = f'; its first keys are {", ".join(list(weights)[:5])}' if weights else ''
                self.foreign = f"holds none of the model's {len(model.state_dict())} tensors{first}"
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
        if self.foreign:
            raise ValueError(f'load_from: {runner._load_from} {self.foreign}')


def _training(runner: Runner) -> dict:
    """Of a run's data and loop, in plain values; None for what is not known."""
    loader = runner.train_dataloader
    return dict(
        by_epoch=isinstance(runner.train_loop, EpochBasedTrainLoop),
        images=len(loader.dataset) if hasattr(loader.dataset, '__len__') else None,
        batch_size=loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None),
        processes=get_world_size(),
        accumulated=getattr(next(iter(wrappers_by_name(runner.optim_wrapper).values())), '_accumulative_counts', None),
    )


def _saved_training(checkpoint: dict) -> dict:
    """Of the run that was saved; nothing if it was one of mmengine's own tools."""
    training = checkpoint['meta'].get('training')
    return training if isinstance(training, dict) else {}


def _mismatch(runner: Runner, checkpoint: dict) -> str:
    """What of a checkpoint does not fit the run, as a sentence; '' if nothing."""
    own, averages = unwrap_model(runner.model).state_dict(), checkpoint.get('ema_state_dict')
    problem = _other_tensors(own, checkpoint['state_dict']) or _other_classes(runner, checkpoint['meta'])
    if not problem and averages is not None:
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            return 'it holds averaged weights, and this config has no EMAHook'
        averages = averages if isinstance(averages, dict) else {}
        averages = {key[7:]: value for key, value in averages.items() if str(key).startswith('module.')}
        problem = _other_tensors(own, averages)
    by_epoch = _saved_training(checkpoint).get('by_epoch')
    if not problem and by_epoch not in (None, _training(runner)['by_epoch']):
        then, now = ('epochs', 'iterations') if by_epoch else ('iterations', 'epochs')
        return f'it was trained by {then}, this config trains by {now}'
    return problem or _other_schedules(runner, checkpoint) or _other_optimizers(runner, checkpoint)


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
    data = meta.get('dataset_meta')
    found = data.get('classes') if isinstance(data, dict) else None
    own = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
    if isinstance(found, (list, tuple)) and own and list(found) != list(own):
        return f'its classes are {_shown(found)}, those of the training data are {_shown(own)}'
    return ''


def _shown(classes) -> str:
    names = list(map(str, classes))
    return ', '.join(names[:5]) + (f', ... ({len(names)})' if len(names) > 5 else '')


def _schedulers(schedulers) -> dict[str, object]:
    """Schedulers, or their states, of one optimizer or of several by name."""
    named = schedulers if isinstance(schedulers, dict) else {'': schedulers}
    parts = {name: part for name, part in named.items() if isinstance(part, list)}
    return {f'param_scheduler[{i}] {name}'.strip(): one for name, part in parts.items() for i, one in enumerate(part)}


def _other_schedules(runner: Runner, checkpoint: dict) -> str:
    own, saved = _schedulers(runner.param_schedulers), _schedulers(checkpoint.get('param_schedulers'))
    if own and own.keys() != saved.keys():
        return f'it has {len(saved)} param_schedulers, the config has {len(own)}'
    for key, scheduler in own.items():
        own_state, state = to_plain(scheduler.state_dict())[0], saved[key]
        same = isinstance(state, dict) and _arguments(scheduler) & own_state.keys() <= state.keys() <= own_state.keys()
        if not same or state.get('param_name') != scheduler.param_name or not _numbers_fit(own_state, state):
            return f'its {key} is not a {type(scheduler).__name__} or damaged'
    return ''


def _arguments(scheduler) -> set[str]:
    """What a config can set of a scheduler."""
    return {name for kind in type(scheduler).__mro__ for name in inspect.signature(kind.__init__).parameters}


def _other_optimizers(runner: Runner, checkpoint: dict) -> str:
    kinds = checkpoint['meta'].get('optimizers')
    for name, wrapper in wrappers_by_name(runner.optim_wrapper).items():
        optimizer, state = wrapper.optimizer, _state(checkpoint, name)
        groups = state.get('param_groups')
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            return f'it has no state of the optimizer {name}'.rstrip()
        saved = checkpoint.get('param_schedulers')
        regroup(state, (saved.get(name) if name else saved) or [], wrapper, unwrap_model(runner.model))
        groups = state['param_groups']
        kind = kinds.get(name) if isinstance(kinds, dict) else None
        own = type(optimizer).__name__
        pairs = list(zip(optimizer.param_groups, groups))
        same = all(_settings(pair[0]) == _settings(pair[1]) and _numbers_fit(*pair) for pair in pairs)
        if kind not in (None, own) or not same:
            settings = ', with other settings' if kind == own else ''
            return f'its optimizer is {kind or "another one"}, that of the config is {own}{settings}'
        sizes = [[len(group['params']) for group in optimizer.param_groups]]
        sizes.append([len(part) if isinstance(part := group.get('params'), list) else -1 for group in groups])
        if sizes[0] != sizes[1]:
            own, saved = (f'{sum(part)} parameters in {len(part)} groups' for part in sizes)
            return f'its optimizer has {saved}, that of the config has {own}' + (', in another order' * (own == saved))
        if not _states_fit(state.get('state'), groups, optimizer):
            return 'the state of its optimizer is of other parameters, or of these in another order'
    return ''


def _state(checkpoint: dict, name: str) -> dict:
    state = checkpoint['optimizer'].get(name) if name else checkpoint['optimizer']
    return state if isinstance(state, dict) else {}


def _settings(group: dict) -> set[str]:
    """Of an optimizer; without flags, which differ between versions of PyTorch."""
    flags = {key for key, value in group.items() if isinstance(value, (bool, type(None)))}
    return {key for key in group if key not in flags and not str(key).startswith('initial_')}


def _numbers_fit(own: dict, saved: dict) -> bool:
    """Whether a state has numbers where the other has."""
    numbers = [key for key, value in own.items() if isinstance(value, (int, float)) and key in saved]
    return all(isinstance(saved[key], (int, float, Tensor, type(None))) for key in numbers)


def _states_fit(states, groups: list[dict], optimizer: torch.optim.Optimizer) -> bool:
    pairs = zip(
        (index for group in groups for index in group['params']),
        (parameter for group in optimizer.param_groups for parameter in group['params']),
    )
    for index, parameter in pairs:
        state = states.get(index, {}) if isinstance(states, dict) and isinstance(index, int) else None
        if not isinstance(state, dict):
            return False
        for value in state.values():  # some optimizers have values of fewer axes
            if isinstance(value, Tensor) and value.dim() == parameter.dim() and value.shape != parameter.shape:
                return False
    return True


def _changes(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """What the config changes from here on."""
    meta, now = checkpoint['meta'], _training(runner)
    for key, words in _DATA.items():
        before = _saved_training(checkpoint).get(key)
        if None not in (before, now[key]) and before != now[key]:
            yield f'{before} {words} so far, {now[key]} from here on; learning rate and schedule are not adapted'
    name, done = ('max_epochs', meta['epoch']) if now['by_epoch'] else ('max_iters', meta['iter'])
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
        for key in sorted(pairs[0][0].keys() & pairs[0][1].keys() - _NO_SETTINGS) if pairs else ():
            values = [tuple(group.get(f'initial_{key}', group.get(key)) for group in pair) for pair in pairs]
            other = [pair for pair in values if pair[0] != pair[1]]
            if other and not key.startswith('initial_'):
                groups = f' ({len(other)} of {len(pairs)} groups of parameters)' if len(pairs) > 1 else ''
                yield f'{key} of the optimizer {name}'.rstrip() + f': {words.format(*other[0])}{groups}'
    saved = _schedulers(checkpoint.get('param_schedulers'))
    for place, scheduler in _schedulers(runner.param_schedulers).items():
        names = _arguments(scheduler) - _NO_SETTINGS
        for key, value in scheduler.state_dict().items():
            if key in names and saved[place].get(key) != value:
                yield f'{key} of {place} ({type(scheduler).__name__}): {words.format(value, saved[place].get(key))}'
