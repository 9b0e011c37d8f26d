"""Checkpoints of another training than the one that is to take them."""

import copy
import shutil

import pytest
import torch
from helpers.runs import train_here

from mmstrip.engine.hooks import CheckpointFitHook
from mmstrip.engine.resume import read_resumable


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A runner that has resumed the checkpoint of one epoch, in its work dir; it had nothing to warn of."""
    folder = tmp_path_factory.mktemp('trained')
    train_here(folder)
    runner, warnings = train_here(folder)
    assert 'This config differs' not in warnings
    return runner


def test_a_head_of_other_classes_is_refused(trained):
    with pytest.raises(ValueError) as raised:
        train_here(trained.work_dir, {'model.head.num_classes': 7})
    assert str(raised.value) == (
        f'{trained.work_dir}/epoch_1.pth cannot be resumed with this config: head.fc.weight has shape (10, 128) in the '
        'checkpoint, but (7, 128) in the model. To start a new training from its weights, set load_from to it and '
        'leave out --resume'
    )


def group(checkpoint: dict) -> dict:
    return checkpoint['optimizer']['param_groups'][0]


def split_groups(checkpoint: dict) -> None:
    first = group(checkpoint)
    parameters = first['params']
    first['params'] = parameters[:40]
    checkpoint['optimizer']['param_groups'].append(dict(first, params=parameters[40:]))


def use_sgd(checkpoint: dict) -> None:
    del checkpoint['meta']['training']  # as of mmengine's own
    first = group(checkpoint)
    del first['betas'], first['eps']
    first.update(momentum=0.9, dampening=0)


CLASSES = 'its classes are 1, 0, 2, 3, 4, ... (10), but those of the training data are 0, 1, 2, 3, 4, ... (10)'
OTHERS = {
    'it lacks 2 tensors: head.fc.weight, head.fc.bias': lambda c: [
        c['state_dict'].pop(key) for key in list(c['state_dict'])[-2:]
    ],
    'it has 1 unexpected tensors: aux.bias': lambda c: c['state_dict'].update({'aux.bias': torch.ones(1)}),
    CLASSES: lambda c: c['meta']['dataset_meta'].update(classes=list('1023456789')),
    'its optimizer is Adam, but the config has AdamW': lambda c: c['meta']['training'].update(optimizers={'': 'Adam'}),
    'its optimizer is another one, but the config has AdamW': use_sgd,
    'its optimizer has 143 parameters in 2 groups, but that of the config has 143 parameters in 1 groups': split_groups,
    'belongs to other parameters, or to these in another order': lambda c: group(c)['params'].reverse(),
    'it has no state of the optimizer': lambda c: c['optimizer'].clear(),
    'it has 2 parameter schedulers, but the config has 1': lambda c: c['param_schedulers'].append({}),
    'it has 0 parameter schedulers, but the config has 1': lambda c: c.pop('param_schedulers'),
    'its param_scheduler[0] is not the CosineAnnealingLR of the config': lambda c: c['param_schedulers'][0].pop(
        'T_max'
    ),
    'it was trained by iterations, but this config trains by epochs': lambda c: c['meta']['training'].update(
        unit='iterations'
    ),
    'it contains averaged weights, but this config has no EMAHook': lambda c: c.update(ema_state_dict={}),
}


@pytest.mark.parametrize('words', OTHERS)
def test_a_checkpoint_of_another_training_is_refused(words, trained):
    checkpoint = read_resumable(trained._load_from)
    OTHERS[words](checkpoint)
    with pytest.raises(ValueError) as raised:
        CheckpointFitHook().after_load_checkpoint(trained, checkpoint)
    start, end = f'{trained._load_from} cannot be resumed with this config: ', '. To start a new training from its'
    assert str(raised.value).startswith(start) and words in str(raised.value) and end in str(raised.value)


INCOMPLETE = {
    'it has no optimizer state': lambda c: c.pop('optimizer'),
    'it has no state_dict': lambda c: c.update(state_dict=None),
    'it has no meta with epoch': lambda c: c.update(meta='none'),
    'its meta lacks the epoch or iteration': lambda c: c['meta'].update(epoch='1'),
    'its message_hub must have log_scalars, runtime_info, resumed_keys': lambda c: c['message_hub'].clear(),
}


@pytest.mark.parametrize('words', INCOMPLETE)
def test_what_is_no_checkpoint_of_a_training_is_refused_by_name(words, tmp_path):
    checkpoint = dict(
        state_dict={},
        optimizer={},
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        meta=dict(epoch=1, iter=3),
    )
    INCOMPLETE[words](checkpoint)
    torch.save(checkpoint, tmp_path / 'changed.pth')
    with pytest.raises(ValueError) as raised:
        read_resumable(tmp_path / 'changed.pth')
    assert f'{tmp_path}/changed.pth cannot be resumed from: {words}' in str(raised.value)


def test_the_text_of_a_config_is_not_run(trained):
    """mmengine runs that of older checkpoints, to compare the number of GPUs."""
    checkpoint = read_resumable(trained._load_from)
    checkpoint['meta']['config'] = 'raise SystemExit'
    CheckpointFitHook().after_load_checkpoint(trained, checkpoint)
    assert 'config' not in checkpoint['meta']


def test_what_a_resumed_run_does_not_apply_is_said(trained, tmp_path):
    shutil.copy(trained._load_from, tmp_path)
    options = {
        'optim_wrapper.optimizer.lr': 0.5,
        'optim_wrapper.optimizer.weight_decay': 0.3,
        'optim_wrapper.accumulative_counts': 2,
        'param_scheduler.0.eta_min': 0.1,
        'train_dataloader.dataset.indices': 16,
        'train_dataloader.batch_size': 4,
        'train_cfg.max_epochs': 2,
        'custom_hooks': [dict(type='EMAHook')],
    }
    _, warnings = train_here(tmp_path, options)
    for line in (
        'training images: 30 so far, 16 from here on; learning rate and schedule are not adapted',
        'images per batch and process: 8 so far, 4 from here on; ',
        'accumulated batches: 1 so far, 2 from here on; ',
        'the checkpoint has no averaged weights: the average (EMA) starts from its weights',
        'max_epochs was 1 and is now 2: training continues with the schedule of the checkpoint',
        'lr of the optimizer: 0.5 in the config is ignored, training continues with 0.003',
        'weight_decay of the optimizer: 0.3 in the config is ignored, training continues with 0.05',
        'eta_min of param_scheduler[0] (CosineAnnealingLR): 0.1 in the config is ignored, ',
        'end of param_scheduler[0] (CosineAnnealingLR): 8 in the config is ignored, training continues with 3',
        'To train with this config only, start a new training from these weights: load_from, without --resume',
    ):
        assert line in warnings
    done = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert done['meta']['iter'] == 3 + 4 and done['optimizer']['param_groups'][0]['initial_lr'] == 0.003
    options.update({'train_cfg.max_epochs': 1, 'train_dataloader.dataset.indices': 40})
    _, warnings = train_here(tmp_path, options)
    assert 'training images: 16 so far, 40 from here on' in warnings
    assert 'max_epochs was 2 and is now 1: nothing is left to do' in warnings


def test_load_from_takes_the_names_of_wrappers(trained, tmp_path):
    weights = torch.load(trained._load_from, weights_only=True)['state_dict']
    compiled = {key.replace('backbone.', 'backbone._orig_mod.'): value for key, value in weights.items()}
    torch.save(compiled, tmp_path / 'start.pth')
    options = {'load_from': str(tmp_path / 'start.pth'), 'optim_wrapper.optimizer.lr': 0.0}
    options['custom_hooks'] = [dict(type='EMAHook')]
    runner, _ = train_here(tmp_path / 'work', options, resume=False)
    parameters = dict(runner.model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in parameters.items())


def test_load_from_refuses_foreign_weights(trained):
    runner, hook = copy.copy(trained), CheckpointFitHook()
    runner._resume, runner._load_from = False, 'start.pth'
    with pytest.raises(ValueError, match="^start.pth contains none of the model's 182 tensors$"):
        hook.after_load_checkpoint(runner, dict(net=dict(weight=torch.ones(1))))
    with pytest.raises(ValueError, match='tensors; its first keys are net.head.fc.bias$'):
        hook.after_load_checkpoint(runner, {'net.head.fc.bias': torch.ones(10)})
    hook.after_load_checkpoint(runner, {'head.fc.bias': torch.ones(10)})  # a part is what fine-tuning starts from
    with pytest.raises(
        ValueError, match="^start.pth does not fit the model: it lacks [0-9]+ of the model's 182 tensors"
    ):
        hook.before_test(runner)
    hook.before_train(runner)
    hook.before_test(runner)


def test_best_checkpoints_of_other_folders_stay(tmp_path):
    """A work dir that was copied: the paths in its checkpoints are those of the first one."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    options = {'default_hooks.checkpoint.save_best': 'auto'}
    train_here(first, options, validate=True)
    (best,) = first.glob('best_*')
    shutil.copytree(first, second)
    checkpoint = torch.load(first / 'epoch_1.pth', weights_only=True)
    checkpoint['message_hub']['runtime_info']['best_score'] = -1.0
    torch.save(checkpoint, second / 'epoch_1.pth')
    (second / 'last_checkpoint').write_text(str(second / 'epoch_1.pth'))
    train_here(second, {**options, 'train_cfg.max_epochs': 2}, validate=True)
    assert best.exists() and [file.name for file in second.glob('best_*')] == [best.name.replace('epoch_1', 'epoch_2')]
