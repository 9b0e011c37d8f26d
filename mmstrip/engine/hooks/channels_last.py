"""Memory in which some networks train faster."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lets the convolutions' weights, and so the maps, lie in memory as NHWC: the same values, sometimes sooner."""

    def before_train(self, runner: Runner) -> None:
        runner.model.to(memory_format=torch.channels_last)

    before_test = before_train
