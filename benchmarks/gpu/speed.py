"""Backbones alone: inference, dense tasks and memory."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.benchmark import Timer

from ..speed.measuring import Candidate, Settings
from ..speed.specs import Spec
from .iterations import NETWORKS, SMALL, STRIP
from .page import attempt

_STRIP_FORMS = ((), ('deploy',), ('deploy', 'cudagraphs'), ('reference',))
_PEER_FORMS = ((), ('compile',), ('compile', 'cudagraphs'))


def spec(name: str, dry: bool = False, *forms: str, **arguments) -> Spec:
    """A backbone in its fastest memory format."""
    kind, own, _, layout = (SMALL if dry else NETWORKS)[name]
    forms = ('channels_last',) * (layout is not None) + forms
    label = ' '.join([name, *(f'@{form}' for form in forms), *(f'{key}={arguments[key]}' for key in arguments)])
    return Spec(label, kind, own | arguments, forms)


def measure(specs: Sequence[Spec], modes: Sequence[str], batch: int, dry: bool, shape=(224, 224)) -> list[dict]:
    """A row for each model and mode in bfloat16, or with its error; CUDA graphs on CUDA alone."""
    specs = [one for one in specs if not (dry and 'cudagraphs' in one.forms)]
    shape, batch = ((64, 64), 2) if dry else (shape, batch)

    def time(one: Spec, mode: str) -> dict:
        candidate = Candidate(one, Settings((mode,), batch, dtype='bfloat16', device='cpu' if dry else 'cuda'))
        if mode == 'inference':
            candidate.difference(shape)  # or an error
        step = candidate.step(mode, shape)
        for _ in range(3):  # compilers and CUDA graphs need their time
            step()
        timer = Timer('step()', globals=dict(step=step), num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=0.01 if dry else 1).median
        rates = dict(ms=round(1e3 * seconds, 3), images_per_second=round(batch / seconds, 1))
        return rates | dict(peak_mib=round(candidate.peak_mib(mode, shape)))

    image = ' x '.join(map(str, shape))
    return [
        attempt(partial(time, one, mode), model=one.label, mode=mode, image=image, batch=batch)
        for one in specs
        for mode in modes
    ]


def inference(name: str, batch: int, dry: bool = False) -> list[dict]:
    """All forms of a network."""
    specs = [spec(name, dry, *forms) for forms in (_STRIP_FORMS if name == STRIP else _PEER_FORMS)]
    return measure(specs, ['inference'], batch, dry)


def dense(name: str, dry: bool = False) -> list[dict]:
    """All maps of two images of a detector, in inference and training."""
    forms = _STRIP_FORMS[:1] if name == STRIP else _PEER_FORMS[:2]
    specs = [spec(name, dry, *one, out_indices=(0, 1, 2, 3)) for one in forms]
    return measure(specs, ['inference', 'train'], 2, dry, (800, 1216))


def memory(dry: bool = False) -> list[dict]:
    """Training steps by batch, with and without checkpointing; their peak is beyond the weights."""
    specs = [spec(STRIP, dry, with_cp=checkpointing) for checkpointing in (False, True)]
    return [row for batch in (64, 256) for row in measure(specs, ['train'], batch, dry)]
