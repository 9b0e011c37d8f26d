"""Run in several processes, or alone: gradients of this number of processes, written by the first one.

rank_checks.py OUT
"""

import os
import sys

import torch
import torch.distributed
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.model import MMDistributedDataParallel

from helpers import randomise, small_backbone
from mmstrip.engine.launch import leave_group


def gradients() -> dict[str, torch.Tensor]:
    """Of the mean loss over a batch of 4, of which each process has its share; BN with fixed statistics."""
    torch.manual_seed(0)
    model = randomise(small_backbone(drop_path_rate=0.0)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, targets = torch.randn(4, 3, 64, 64), torch.randn(4)
    share = slice(get_rank(), None, get_world_size())
    whole = MMDistributedDataParallel(model) if get_world_size() > 1 else model
    loss = (whole(images[share])[0].mean(dim=(1, 2, 3)) - targets[share]).square().mean()
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def main(out: str) -> None:
    if 'WORLD_SIZE' in os.environ:
        torch.distributed.init_process_group('gloo')
    found = gradients()
    if is_main_process():
        torch.save(found, out)
    leave_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
