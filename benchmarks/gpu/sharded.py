"""What each process of a sharded model (FSDP2) does: its gradients must be those of whole copies.

Run by torchrun with a file for the result, the kind of device and 1 for the smallest network, else 0.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..results import write_json
from ..speed.measuring import peak_memory, seconds_of
from .checks import TOLERANCES, Case, WrongResultError, full_float32, small_case, weighted_mean

BATCH = 64


def compare(kind: str, tiny: bool) -> dict:
    """Errors, and of whole and sharded models milliseconds and MiB of a step under autocast to bfloat16."""
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind, int(os.environ['LOCAL_RANK'])) if kind == 'cuda' else torch.device('cpu')
    case = small_case() if tiny else Case('base')
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(2 if tiny else BATCH, 3, case.side, case.side, generator=generator).to(device)
    whole, sharded = case.build().to(device).train(), shard(case.build().to(device).train(), kind, count)
    with full_float32():
        for model in (whole, sharded):
            weighted_mean(model(images[:2])).backward()
    expected = gradients(whole)
    for value in expected.values():
        dist.all_reduce(value)
        value.div_(count)
    found = gradients(sharded)
    one, other = (torch.cat([part[name].flatten() for name in expected]) for part in (found, expected))
    error = ((one - other).norm() / other.norm()).item()
    if not error <= TOLERANCES['float32'][1]:
        raise WrongResultError(f'gradients of the sharded model differ by {error:.1e} from those of whole copies')
    costs = {name: _cost(model, images, str(device)) for name, model in dict(whole=whole, sharded=sharded).items()}
    return dict(processes=count, batch=len(images), gradients=error, **costs)


def shard(model: nn.Module, kind: str, count: int) -> nn.Module:
    """Each block by itself, then what is left."""
    mesh = init_device_mesh(kind, (count,))
    for stage in model.stages:
        for block in stage:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(p.grad, 'full_tensor', p.grad.clone)() for name, p in model.named_parameters()}


def _cost(model: nn.Module, images: torch.Tensor, device: str) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            maps = model(images)
        sum(feature.float().mean() for feature in maps).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    seconds = seconds_of(step, device, repeats=5)
    peak = peak_memory(step, device) / 2**20 if device.startswith('cuda') else None
    held = sum(_local(value).nbytes for value in model.parameters()) / 2**20
    return dict(step_ms=round(1e3 * seconds, 2), peak_mib=peak and round(peak), weights_mib=round(held, 2))


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, 'to_local') else value


def main(out: str, kind: str, tiny: str) -> None:
    if kind == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    result = compare(kind, bool(int(tiny)))
    if dist.get_rank() == 0:
        write_json(Path(out), result)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
