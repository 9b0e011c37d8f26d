"""The log of a training on a GPU: no iteration waits for its losses, and none is missing where they are read."""

from types import SimpleNamespace

import torch
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub

from mmstrip.engine import host_copy
from mmstrip.engine.hooks import LateLossesHook


class OnGPU(torch.Tensor):
    is_cuda = True


class Late(host_copy.HostCopy):
    """It is there when it is waited for."""

    def __init__(self, values):
        super().__init__(torch.Tensor(values.as_subclass(torch.Tensor)))

    def arrived(self):
        return False


def test_losses_are_there_when_they_are_logged_or_saved(monkeypatch):
    monkeypatch.setattr(host_copy, 'HostCopy', Late)
    hub = MessageHub('late losses')
    runner = SimpleNamespace(message_hub=hub, hooks=[LoggerHook(interval=3)], train_dataloader=range(8), iter=0)
    hook, found = LateLossesHook(), []
    for step in range(8):
        loss = torch.tensor(float(step)).as_subclass(OnGPU)
        hook.after_train_iter(runner, step, None, dict(loss=loss))
        found.append(len(hub.log_scalars['train/loss'].data[0]) if 'train/loss' in hub.log_scalars else 0)
        if step == 3:
            checkpoint = {}
            hook.before_save_checkpoint(runner, checkpoint)
            assert len(checkpoint['message_hub']['log_scalars']['train/loss'].data[0]) == 4
    assert found == [0, 0, 3, 3, 4, 6, 6, 8]
    assert hub.log_scalars['train/loss'].data[0].tolist() == list(map(float, range(8)))
