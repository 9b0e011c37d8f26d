"""Several processes on one machine."""

import re
import socket

import torch
from helpers import ROOT, SMALL_CONFIG, run

from mmstrip.datasets.digit_scenes import write_digit_scenes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def launch(script, *arguments, **env):
    helpers = str(ROOT / 'tests' / 'helpers')
    # gloo, as on a machine without GPUs, so that the test is the same everywhere.
    settings = dict(PORT=str(free_port()), PYTHONPATH=helpers, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', **env)
    return run('bash', ROOT / 'tools' / script, *arguments, env=settings)


def test_two_processes_train_one_model_and_test_it(tmp_path):
    config = tmp_path / 'two.py'
    config.write_text(
        f'_base_ = [{str(SMALL_CONFIG)!r}]\n'
        "custom_imports = dict(imports=['rank_dump'])\n"
        'custom_hooks = _base_.custom_hooks\n'
        f"custom_hooks.append(dict(type='RankDumpHook', folder={str(tmp_path)!r}))\n"
    )
    done = launch(
        'dist_train.sh',
        config,
        2,
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=32',
    )
    assert done.returncode == 0, done.stdout
    assert 'Distributed launcher: pytorch' in done.stdout
    ranks = [torch.load(tmp_path / f'rank{rank}.pth') for rank in range(2)]
    start = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert len(ranks[0]) > 100
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
        assert torch.equal(value, start[name]), name

    # 360 images over two processes: nothing counted twice or dropped.
    test = launch('dist_test.sh', config, tmp_path / 'work' / 'epoch_1.pth', '--work-dir', tmp_path / 'test', GPUS='2')
    assert test.returncode == 0, test.stdout
    expected = re.search(r'Test (top-1 .*of 360 images\))', done.stdout).group(1)
    assert f'Test {expected}' in test.stdout


def test_two_processes_train_a_segmentor(tmp_path):
    """No parameter is left unused, and SyncBN, which CPUs do not have, is replaced."""
    write_digit_scenes(tmp_path / 'data', num_train=16, num_val=2, size=64)
    config = tmp_path / 'two.py'
    config.write_text(
        f'_base_ = [{str(ROOT / "configs/segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py")!r}]\n'
        "custom_imports = dict(imports=['rank_dump'])\n"
        f"custom_hooks = [dict(type='RankDumpHook', folder={str(tmp_path)!r}), dict(type='SyncBuffersHook')]\n"
        f'train_dataloader = dict(batch_size=4, dataset=dict(data_root={str(tmp_path / "data")!r}))\n'
        "model = dict(backbone=dict(norm_cfg=dict(type='SyncBN'), out_indices=(0, 1, 2)), neck=dict(num_outs=3))\n"
        'model.update(decode_head=dict(in_index=[0, 1, 2], in_channels=[64] * 3, feature_strides=[4, 8, 16]))\n'
        'model["neck"]["in_channels"] = [48, 96, 192]\n'
        'train_cfg = dict(max_epochs=1)\n'
    )
    done = launch('dist_train.sh', config, 2, '--work-dir', tmp_path / 'work', '--no-validate')
    assert done.returncode == 0, done.stdout
    assert 'SyncBN is not there for CPUs' in done.stdout
    ranks = [torch.load(tmp_path / f'rank{rank}.pth') for rank in range(2)]
    weights = [name for name in ranks[0] if name.endswith(('weight', 'bias', 'table'))]
    assert len(weights) > 100 and all(torch.equal(ranks[0][name], ranks[1][name]) for name in weights)


def test_usage_is_shown():
    for script, words in (
        ('dist_train.sh', 'CONFIG GPUS'),
        ('dist_test.sh', 'CONFIG CHECKPOINT GPUS'),
        ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG WORK_DIR'),
        ('slurm_test.sh', 'PARTITION JOB_NAME CONFIG CHECKPOINT'),
    ):
        done = run('bash', ROOT / 'tools' / script)
        assert done.returncode == 2 and f'tools/{script} {words}' in done.stdout


def test_slurm_scripts_give_srun_the_tools_arguments(tmp_path):
    """With an srun that only prints what it gets."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    settings = f'PATH={tmp_path}:$PATH GPUS=16 SRUN_ARGS="--qos high"'
    done = run('bash', '-c', f'{settings} tools/slurm_train.sh gpu job c.py out --amp')
    assert '--partition=gpu --job-name=job --gres=gpu:8 --ntasks=16' in done.stdout
    assert re.search(r'--qos high python -u .*/train.py c.py --work-dir out --amp --launcher slurm', done.stdout)
