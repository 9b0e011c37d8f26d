"""Several processes, and nodes, on one machine."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, forked_torchrun, rank_checks, run
from helpers.runs import CONFIG, call_ranks, call_tool, run_here, start_tool
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.utils.distributed import get_free_port

from mmstrip.datasets.digit_scenes import write_digit_scenes


def environment(**settings) -> dict[str, str]:
    """gloo, as on a machine without GPUs, so that the test is the same everywhere."""
    paths = os.pathsep.join(map(str, [ROOT / 'tests', ROOT]))
    return dict(PORT=str(get_free_port()), PYTHONPATH=paths, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', **settings)


def torchrun_arguments(folder, script: str, *arguments, **env) -> list[str]:
    """The command line that a script of tools/ gives to tools/torchrun.py."""
    printer = folder / 'python'
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    printed = run('bash', ROOT / 'tools' / script, *arguments, env={**environment(PYTHON=str(printer)), **env})
    tool, *line = printed.stdout.splitlines()
    assert tool == f'{ROOT}/tools/torchrun.py'
    return line


def launch(folder, *command, **env):
    """A script of tools/ with its command line, whose processes do not pay for their imports."""
    return call_tool(forked_torchrun.__file__, *torchrun_arguments(folder, *command, **env), folder=folder)


def weights_of_ranks(folder) -> list[dict]:
    return [torch.load(folder / f'rank{rank}.pth') for rank in range(2)]


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 100
    assert not [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_two_processes_train_a_segmentor(tmp_path):
    """No parameter is left unused, and SyncBN, which CPUs do not have, is replaced."""
    write_digit_scenes(tmp_path / 'data', num_train=16, num_val=2, size=64)
    config = tmp_path / 'two.py'
    config.write_text(
        f'_base_ = [{str(ROOT / "configs/segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py")!r}]\n'
        "custom_imports = dict(imports=['helpers.rank_dump'])\n"
        f"custom_hooks = [dict(type='RankDumpHook', folder={str(tmp_path)!r}), dict(type='SyncBuffersHook')]\n"
        f'train_dataloader = dict(batch_size=4, dataset=dict(data_root={str(tmp_path / "data")!r}))\n'
        "model = dict(backbone=dict(norm_cfg=dict(type='SyncBN'), out_indices=(0, 1, 2)), neck=dict(num_outs=3))\n"
        'model.update(decode_head=dict(in_index=[0, 1, 2], in_channels=[64] * 3, feature_strides=[4, 8, 16]))\n'
        'model["neck"]["in_channels"] = [48, 96, 192]\n'
        'train_cfg = dict(max_epochs=1)\n'
    )
    arguments = ['--launcher', 'pytorch', '--work-dir', tmp_path / 'work', '--no-validate']
    printed = call_ranks('train.py', config, *arguments, folder=tmp_path)
    assert 'SyncBN is not available on CPUs' in printed
    ranks = weights_of_ranks(tmp_path)
    weights = [name for name in ranks[0] if name.endswith(('weight', 'bias', 'table'))]
    assert len(weights) > 100 and all(torch.equal(ranks[0][name], ranks[1][name]) for name in weights)


def tiny(folder, *hooks: str) -> str:
    """A config of two epochs of two iterations, after which the ranks write their weights to the folder."""
    folder.mkdir(exist_ok=True)
    config, dump = folder / 'tiny.py', f"dict(type='RankDumpHook', folder={str(folder)!r})"
    config.write_text(
        f'_base_ = [{str(CONFIG)!r}]\n'
        "custom_imports = dict(imports=['helpers.rank_dump'])\n"
        f"custom_hooks = [dict(type='SyncBuffersHook'), {dump}, {', '.join(hooks)}]\n"
        'train_dataloader = dict(batch_size=6)\n'
        'val_dataloader = test_dataloader = dict(dataset=dict(indices=97))\n'
        'train_cfg = dict(max_epochs=2)\n'
        'param_scheduler = None\n'
        'randomness = dict(seed=7)\n'
    )
    return str(config)


@pytest.fixture(scope='module')
def two_nodes(tmp_path_factory) -> tuple[Path, str]:
    """Where two nodes with one process each, both started by hand, have trained, and what the first one printed."""
    folder = tmp_path_factory.mktemp('nodes')
    config, port = tiny(folder), str(get_free_port())
    command, nodes = ['dist_train.sh', config, 1, '--work-dir', folder / 'work'], []
    for rank in range(2):
        settings = dict(NNODES='2', NODE_RANK=str(rank), MASTER_ADDR='127.0.0.1', PORT=port)
        arguments = torchrun_arguments(folder, *command, **settings)
        nodes.append(start_tool(forked_torchrun.__file__, *arguments, output=folder / f'node{rank}.txt'))
    for node in nodes:
        node.join(300)
    printed = [(folder / f'node{rank}.txt').read_text() for rank in range(2)]
    assert [node.exitcode for node in nodes] == [0, 0], ''.join(printed)
    return folder, printed[0]


def test_two_nodes_train_one_model_and_two_processes_test_it(two_nodes, tmp_path):
    folder, printed = two_nodes
    assert 'Distributed launcher: pytorch' in printed
    assert 'using the gloo backend' in printed
    ranks = weights_of_ranks(folder)
    assert_equal_weights(*ranks)
    checkpoint = folder / 'work' / 'epoch_2.pth'
    assert_equal_weights(ranks[0], torch.load(checkpoint)['state_dict'])
    assert not list(folder.glob('group*'))
    # Of an odd number of images over two processes: nothing counted twice or dropped.
    figures, top5 = re.findall(r'(accuracy/top1: [\d.]+ +accuracy/top5: ([\d.]+))', printed)[-1]
    right = float(top5) * 97 / 100
    assert right > 10 and right == pytest.approx(round(right), abs=1e-3)
    arguments = ['dist_test.sh', folder / 'tiny.py', checkpoint, '--work-dir', tmp_path / 'test']
    test = launch(tmp_path, *arguments, GPUS='2')
    assert test.returncode == 0 and figures in test.stdout, test.stdout


def test_a_rank_that_was_killed_is_started_again_and_an_error_ends_the_job(tmp_path, two_nodes):
    """After the kill the job goes on as if nothing had happened, here with the processes on one node."""
    die = f"dict(type='DieHook', iteration=3, once={str(tmp_path / 'died')!r})"
    config = tiny(tmp_path, die, "dict(type='DieHook', iteration=4)")
    arguments = ['--work-dir', tmp_path / 'work', '--resume', '--cfg-options', 'train_cfg.max_epochs=3']
    done = launch(tmp_path, 'dist_train.sh', config, 2, *arguments, MAX_RESTARTS='1')
    assert (tmp_path / 'died').exists()
    assert 'No checkpoint in' in done.stdout and f'Resuming from {tmp_path}/work/epoch_1.pth' in done.stdout
    assert_equal_weights(torch.load(tmp_path / 'work/epoch_2.pth')['state_dict'], weights_of_ranks(two_nodes[0])[0])
    assert done.returncode == 1 and 'OSError: the network card melted' in done.stdout
    assert re.search(r'Root Cause.*rank +: 1 .*melted', done.stdout, re.DOTALL)


def test_sigterm_ends_all_ranks_with_a_checkpoint(tmp_path):
    """As a cluster sends it to the script, whose processes import all that they need."""
    config = tiny(tmp_path)
    command = [ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'work']
    options = ['--cfg-options', 'train_cfg.max_epochs=1000']
    with (tmp_path / 'output.txt').open('w') as output:
        settings = {**os.environ, **environment(PYTHON=sys.executable)}
        job = subprocess.Popen(['bash', *command, *options], env=settings, stdout=output, stderr=output)
        while 'Epoch(train)' not in (tmp_path / 'output.txt').read_text() and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM, (tmp_path / 'output.txt').read_text()
    assert (tmp_path / 'work' / 'last_checkpoint').read_text().endswith('interrupted.pth')


def test_two_processes_have_the_gradients_of_one(tmp_path):
    call_ranks(rank_checks.__file__, tmp_path / 'two.pth', folder=tmp_path)
    two, one = torch.load(tmp_path / 'two.pth'), rank_checks.gradients()
    assert two.keys() == one.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max())


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


def test_a_failed_process_leaves_one_traceback_at_most(monkeypatch):
    """That of the process, which torchrun has printed; its own tells nothing."""

    def fail() -> None:
        raise ChildFailedError('train.py', {0: ProcessFailure(0, 42, 1, '<N/A>')})

    monkeypatch.setattr('torch.distributed.run.main', fail)
    with pytest.raises(SystemExit, match=r'train.py FAILED[^!]*exitcode *: 1 \(pid: 42\)'):
        run_here('torchrun.py')
