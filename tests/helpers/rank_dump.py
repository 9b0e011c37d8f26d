"""A hook for distributed tests, loaded by custom_imports: each rank writes its weights after training."""

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class RankDumpHook(Hook):
    def __init__(self, folder: str):
        self.folder = folder

    def after_train(self, runner) -> None:
        torch.save(runner.model.module.state_dict(), f'{self.folder}/rank{get_rank()}.pth')
