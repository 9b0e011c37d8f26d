"""Part *many*: tools/dist_train.sh on the cards that there are, with what trainings on many ask for."""

import json
from functools import partial
from pathlib import Path

import torch

from . import trainings
from .steps import NotRunError, Setting, Steps

ITERATIONS = 60
SYNC_BN = ('--cfg-options', 'model.backbone.norm_cfg.type=SyncBN')
ACCUMULATION = ('--cfg-options', 'optim_wrapper.accumulative_counts=4')


def steps(setting: Setting) -> Steps:
    cards = count_cards(setting)
    powers = [2**i for i in range(cards.bit_length()) if 2**i < cards] if setting.cuda else []
    half = ('--amp', 'bfloat16')
    return {
        **{f'cards-{count}': partial(train, count, f'cards-{count}', half) for count in (cards, *powers)},
        'float16-loss-scaling': partial(train, cards, 'float16', ('--amp', 'float16')),
        'sync-bn': partial(train, cards, 'sync-bn', (*half, *SYNC_BN)),
        'accumulation': partial(train, cards, 'accumulation', (*half, *ACCUMULATION)),
        'sharded-base': sharded,
    }


def count_cards(setting: Setting) -> int:
    """All cards; without one two processes, which exchange by gloo."""
    return torch.cuda.device_count() if setting.cuda else 2


def train(cards: int, name: str, arguments: tuple[str, ...], setting: Setting) -> dict:
    """Some iterations on random images."""
    if 'float16' in arguments and not setting.cuda:
        raise NotRunError('float16 with loss scaling needs CUDA')
    iterations = 8 if setting.tiny else ITERATIONS
    config = trainings.write_config(setting, name, iterations, cards=cards)
    return trainings.distributed(config, cards, 'work', *arguments)


def sharded(setting: Setting) -> dict:
    """FSDP of `base`: its gradients, time and memory beside those of whole copies, see :mod:`.sharded`."""
    folder = Path(setting.out) / 'trainings' / 'sharded'
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / 'result.json'
    arguments = (str(out), setting.device, str(int(setting.tiny)))
    trainings.module_on_cards(f'{__package__}.sharded', count_cards(setting), folder, *arguments)
    return json.loads(out.read_text())
