"""Detectors and segmentors as users train and test them, on scenes of digits."""

import json
import re
import shutil

import mmengine
import numpy as np
import pytest
from helpers import ROOT, last_line, run_tool
from PIL import Image

CONFIGS = {
    'detection': 'detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py',
    'segmentation': 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py',
}
# What a minute of training must reach; a model that knows background alone has 0 and 8 %.
LEAST = {'detection': ('coco/bbox_mAP_50', 0.05), 'segmentation': ('mIoU', 10)}
EPOCHS = {'detection': 2, 'segmentation': 6}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'scenes'
    done = run_tool('dataset_converters/digit_scenes.py', folder, '--train', '240', '--val', '30', '--size', '64')
    assert done.returncode == 0, done.stdout
    return folder


def write_config(path, task, data_root):
    """The embedded config on other scenes, for fewer epochs."""
    evaluator = f"dict(ann_file='{data_root}/annotations/val.json')" if task == 'detection' else 'dict()'
    path.write_text(
        f"_base_ = ['{ROOT / 'configs' / CONFIGS[task]}']\n"
        f"data = dict(dataset=dict(data_root='{data_root}'))\n"
        'train_dataloader = val_dataloader = test_dataloader = data\n'
        f'val_evaluator = test_evaluator = {evaluator}\n'
        f'train_cfg = dict(max_epochs={EPOCHS[task]}, val_interval={EPOCHS[task]})\n'
        f"param_scheduler = [dict(type='CosineAnnealingLR', end={EPOCHS[task]}, convert_to_iter_based=True)]\n"
    )
    return path


@pytest.fixture(scope='module', params=CONFIGS)
def trained(request, scenes, tmp_path_factory):
    """Task, config, work dir and output of a training."""
    work_dir = tmp_path_factory.mktemp(request.param)
    config = write_config(work_dir / 'config.py', request.param, scenes)
    done = run_tool('train.py', config, '--work-dir', work_dir)
    assert done.returncode == 0, done.stdout
    return request.param, config, work_dir, done.stdout


def metric(task, output):
    return float(re.findall(rf'{LEAST[task][0]}: +([\d.]+)', output)[-1])


def test_training_learns_and_draws_curves(trained):
    task, _, work_dir, output = trained
    assert metric(task, output) >= LEAST[task][1]
    assert re.search(r'eta: \d+:\d+:\d+', output)
    (curves,) = work_dir.glob('*/curves.png')
    assert f'Training curves: {curves}' in output and Image.open(curves).width > 1000
    assert f'Checkpoint: {work_dir}/epoch_{EPOCHS[task]}.pth' in output


def test_testing_gives_the_same_figures_and_pictures(trained, scenes, tmp_path):
    task, config, work_dir, output = trained
    pictures, predictions = tmp_path / 'pictures', tmp_path / 'out.pkl'
    checkpoint = work_dir / f'epoch_{EPOCHS[task]}.pth'
    arguments = ['--work-dir', tmp_path, '--show-dir', pictures, '--interval', '10', '--out', predictions]
    done = run_tool('test.py', config, checkpoint, *arguments)
    assert done.returncode == 0, done.stdout
    assert metric(task, done.stdout) == metric(task, output)
    assert len(mmengine.load(predictions)) == 30
    assert sorted(path.name for path in pictures.iterdir()) == ['00001.png', '00011.png', '00021.png']
    shown = np.array(Image.open(pictures / '00011.png').convert('RGB')).astype(int)
    scene = np.array(Image.open(scenes / 'val' / '00011.png')).astype(int)
    # The scene with the truth beside the scene with the prediction; boxes are shown from a score of 0.3 on.
    assert shown.shape == (64, 128, 3)
    assert np.abs(shown[:, :64] - scene).max() > 0
    assert task == 'detection' or np.abs(shown[:, 64:] - scene).max() > 0


def test_resuming_goes_on_from_the_last_checkpoint(trained, tmp_path):
    task, config, work_dir, _ = trained
    last = EPOCHS[task]
    shutil.copy(work_dir / f'epoch_{EPOCHS[task]}.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / f'epoch_{EPOCHS[task]}.pth'))
    more = ['--cfg-options', f'train_cfg.max_epochs={last + 1}', 'param_scheduler=None']
    done = run_tool('train.py', config, '--work-dir', tmp_path, '--resume', '--no-validate', *more)
    assert done.returncode == 0, done.stdout
    assert f'Epoch(train) [{last + 1}]' in done.stdout and 'Epoch(train) [1]' not in done.stdout
    assert (tmp_path / f'epoch_{last + 1}.pth').is_file()


def test_broken_data_are_named(scenes, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(scenes, data)
    detection = write_config(tmp_path / 'detection.py', 'detection', data)
    segmentation = write_config(tmp_path / 'segmentation.py', 'segmentation', data)
    for image in (data / 'train').iterdir():
        image.unlink()
    done = run_tool('train.py', detection, '--work-dir', tmp_path / 'out')
    assert re.match(rf'FileNotFoundError: no image file at {data}/train/\d+.png', last_line(done.stdout))
    (data / 'annotations' / 'train.json').write_text('{"images": [')
    done = run_tool('train.py', detection, '--work-dir', tmp_path / 'out')
    assert f'ValueError: {data}/annotations/train.json is not an annotation file' in last_line(done.stdout)
    shutil.rmtree(data / 'train')
    shutil.copytree(scenes / 'train', data / 'train')
    for labels in (data / 'labels' / 'train').iterdir():
        Image.fromarray(np.full((64, 64), 17, np.uint8)).save(labels)
    done = run_tool('train.py', segmentation, '--work-dir', tmp_path / 'out')
    assert re.match(rf'ValueError: {data}/labels/train/\d+.png must hold labels from 0 to 10', last_line(done.stdout))


def test_flops_of_detectors_and_segmentors():
    """With proposals, with queries, and as the table of configs/segmentation has it."""
    for name, shape, flops in (
        ('detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py', ('96', '128'), None),
        ('detection/dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco.py', ('192', '320'), None),
        ('segmentation/strip-mlp-tiny-light_fpn_8xb2-80k_ade20k-512x512.py', ('512',), 36),
    ):
        done = run_tool('analysis_tools/get_flops.py', ROOT / 'configs' / name, '--shape', *shape)
        assert done.returncode == 0, done.stdout
        counted = float(re.search(r'FLOPs: +([\d.]+) G', done.stdout).group(1))
        assert counted > 0.1 if flops is None else round(counted) == flops


def test_transfer_is_compared_in_a_table_and_pictures(scenes, tmp_path):
    """One short run of each kind; a second call computes nothing again."""
    arguments = ['transfer.py', '--work-dir', tmp_path, '--data', scenes, '--tasks', 'segmentation']
    short = ['--cfg-options', 'train_cfg.max_epochs=1', 'param_scheduler=None', 'train_dataloader.batch_size=40']
    done = run_tool(*arguments, *short)
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / 'results.json').read_text())
    assert [(result['task'], result['start']) for result in results] == [
        ('segmentation', 'classifier'),
        ('segmentation', 'scratch'),
    ]
    assert all(0 < result['mIoU'] < 1 for result in results)
    assert done.stdout.count('load backbone. in model from:') == 1
    for name in ('curves.png', 'predictions.png'):
        assert Image.open(tmp_path / name).height > 300 and name in done.stdout
    again = run_tool(*arguments, *short)
    assert again.returncode == 0 and 'Epoch(train)' not in again.stdout
    assert json.loads((tmp_path / 'results.json').read_text()) == results
    other = run_tool(*arguments)
    assert 'holds a run with other settings' in last_line(other.stdout)
    wrong = run_tool(*arguments, '--backbones', 'resnet5')
    assert wrong.returncode != 0 and 'resnet18' in last_line(wrong.stdout)
