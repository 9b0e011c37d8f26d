"""Options of training that need no run to be checked."""

import copy

import torch
from helpers import randomise, small_backbone
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmstrip.engine.resumable import choose_checkpoint, make_resumable


def test_accumulated_gradients_are_those_of_the_larger_batch():
    """With BN statistics fixed."""
    images, targets = torch.randn(4, 3, 64, 64), torch.randn(4)
    untrained = randomise(small_backbone(drop_path_rate=0.0)).eval()
    trained = []
    for parts in (1, 2):
        model = copy.deepcopy(untrained)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=parts)
        wrapper.initialize_count_status(model, 0, parts)
        for part, target in zip(images.chunk(parts), targets.chunk(parts)):
            with wrapper.optim_context(model):
                loss = (model(part)[0].mean(dim=(1, 2, 3)) - target).square().mean()
            wrapper.update_params(loss)
        trained.append(dict(model.named_parameters()))
    assert any(not torch.equal(value, trained[0][name]) for name, value in untrained.named_parameters())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-5, atol=1e-6)


def test_any_config_becomes_resumable():
    """Loops, samplers and hooks of the toolboxes' own configs; what a config chose itself stays."""
    config = Config(
        dict(
            work_dir='work',
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=3),
            train_dataloader=dict(num_workers=2, sampler=dict(type='InfiniteSampler', shuffle=True)),
            val_dataloader=dict(num_workers=2, worker_init_fn=dict(type='mine')),
            default_hooks=dict(checkpoint=dict(type='MyCheckpointHook')),
        )
    )
    make_resumable(config)
    assert config.train_cfg == dict(type='mmstrip.ResumableIterLoop', max_iters=3)
    assert config.train_dataloader.sampler.type == 'mmstrip.SeededSampler'
    assert config.train_dataloader.sampler.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert config.train_dataloader.worker_init_fn == dict(type='mmstrip.shield_worker')
    assert config.val_dataloader.worker_init_fn == dict(type='mine')
    assert config.default_hooks.checkpoint.type == 'MyCheckpointHook'
    names = ['mmstrip.SeedHook', 'mmstrip.InvalidLossHook', 'mmstrip.TimeLeftHook', 'mmstrip.NamedFilesHook']
    assert [hook.type for hook in config.custom_hooks] == names
    once = copy.deepcopy(config)
    make_resumable(config)  # a config that a run has dumped
    assert config.to_dict() == once.to_dict()
    for loop in (dict(by_epoch=True, max_epochs=3), dict(type='EpochBasedTrainLoop', max_epochs=3)):
        config = Config(dict(work_dir='work', train_cfg=loop))
        make_resumable(config)
        assert config.train_cfg == dict(type='mmstrip.ResumableEpochLoop', max_epochs=3)
        assert config.default_hooks.checkpoint.type == 'mmstrip.SafeCheckpointHook'


def test_where_a_run_begins(tmp_path):
    """``load_from`` is what a training starts from until the work dir has a checkpoint of its own."""
    start, own = tmp_path / 'start.pth', tmp_path / 'work' / 'epoch_1.pth'
    own.parent.mkdir()
    for resume, expected in (('auto', (False, str(start))), (True, (True, str(start)))):
        torch.save(dict(state_dict={}, optimizer={}, meta={}), start)
        config = Config(dict(work_dir=str(own.parent), load_from=str(start), resume=resume))
        choose_checkpoint(config)
        assert (config.resume, config.load_from) == expected
    torch.save(dict(state_dict={}, optimizer={}, meta=dict(seed=3)), own)
    (own.parent / 'last_checkpoint').write_text(str(own))
    config = Config(dict(work_dir=str(own.parent), load_from=str(start), resume='auto'))
    choose_checkpoint(config)
    assert (config.resume, config.load_from, config.randomness.seed) == (True, str(own), 3)
