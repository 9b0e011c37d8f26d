"""Profiles of models and steps."""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .measuring import Candidate, Settings
from .specs import Spec

MODULE = 'module:'  # marks a module's range in a profile
ROWS = 10  # of the costliest


def costliest_operations(spec: Spec, settings: Settings, mode: str) -> list[tuple[str, str, float]]:
    """Profile a model in a mode, 'inference' or 'train'.

    Returns:
        Module (block numbers as *), operation, and share of the time, the costliest first.

    Raises:
        ValueError: The model runs outside of PyTorch.
    """
    candidate = Candidate(spec, settings)
    if candidate.runtime:
        raise ValueError(f'{spec.label}: only models in PyTorch can be profiled, without {candidate.runtime}')
    for name, module in candidate.model.named_modules():
        if name:
            _mark(module, MODULE + re.sub(r'(\.\d+)\.\d+', r'\1.*', name))
    run = candidate.step(mode, tuple(settings.shapes[0]))
    for _ in range(settings.warmup):
        run()
    cuda = settings.device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        run()
    spent = _times(profiler.events(), cuda)
    total = sum(spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:ROWS]
    return [(module, operation, own / total) for (module, operation), own in ranked]


def kernels_of(run: Callable, device: str) -> dict:
    """Profile a step that has run before.

    Returns:
        'launches' of kernels, fills and copies on a GPU, of operations on a CPU; 'kernels_ms', their total time, which
        is less than the step takes where a GPU waits for launches; 'kernels', the costliest: name as 'kernel', 'calls',
        and 'share' of the total time.
    """
    cuda = device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    kind, own = (DeviceType.CUDA, 'self_device_time_total') if cuda else (DeviceType.CPU, 'self_cpu_time_total')
    found = [
        (getattr(event, own), event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == kind and not getattr(event, 'is_user_annotation', False)
    ]
    total = sum(microseconds for microseconds, *_ in found)
    kernels = [
        dict(kernel=name[:90], calls=calls, share=round(microseconds / total, 4))
        for microseconds, calls, name in sorted(found, reverse=True)[:ROWS]
    ]
    return dict(launches=sum(calls for _, calls, _ in found), kernels_ms=round(total / 1e3, 3), kernels=kernels)


def _times(events: list, cuda: bool) -> dict[tuple[str, str], float]:
    """Own time of each operation in each module, in microseconds."""
    # An operation and its gradient share a number.
    modules = {
        event.sequence_nr: _module_of(event) for event in events if event.sequence_nr >= 0 and not _gradient(event)
    }
    spent = {}
    for event in events:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        kernel = event.device_type == DeviceType.CUDA  # its time counts with the operation that launches it
        if own and not kernel and not event.name.startswith(MODULE):
            gradient = _gradient(event)
            module = modules.get(gradient.sequence_nr, '(model)') if gradient else _module_of(event)
            key = module, event.name + ' (backward)' * bool(gradient)
            spent[key] = spent.get(key, 0) + own
    return spent


def _mark(module: nn.Module, name: str) -> None:
    open_ranges = []

    def enter(*_):
        open_ranges.append(torch.profiler.record_function(name).__enter__())

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _module_of(event) -> str:
    while event is not None:
        if event.name.startswith(MODULE):
            return event.name[len(MODULE) :]
        event = event.cpu_parent
    return '(model)'


def _gradient(event):
    """The step of the backward pass that an event is part of; None in the forward pass."""
    while event is not None and not event.name.startswith('autograd::engine::evaluate_function'):
        event = event.cpu_parent
    return event
