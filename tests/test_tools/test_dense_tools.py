"""Detectors and segmentors as users train and test them, on scenes of digits."""

import re
import shutil

import mmengine
import numpy as np
import pytest
from helpers import ROOT
from helpers.runs import call_tool, run_here
from PIL import Image

from mmstrip.datasets import digit_scenes

CONFIGS = {
    'detection': 'detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py',
    'segmentation': 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py',
}
# What half a minute of training must reach; a model that knows background alone has 0 and 8 %.
LEAST = {'detection': ('coco/bbox_mAP_50', 0.05), 'segmentation': ('mIoU', 15)}
EPOCHS = {'detection': 2, 'segmentation': 15}
# Detectors learn enough to find digits in other scenes; segmentors are to know a few scenes by heart.
SCENES = {'detection': ('val', 160), 'segmentation': ('train', 16)}
NUM_VAL = 16

SMALL = """
_base_ = [{base!r}]
train_dataloader = dict(dataset=dict(data_root={root!r}, indices={count}))
val_dataloader = dict(dataset=dict(data_root={root!r}, indices={num_val}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
param_scheduler = [dict(type='CosineAnnealingLR', end={epochs}, convert_to_iter_based=True)]
optim_wrapper = dict(optimizer=dict(lr=4e-3), paramwise_cfg=dict(_delete_=True))
model = dict(
    backbone=dict(arch=dict(embed_dims=16, depths=(1, 1, 1, 1))), neck=dict(in_channels=[16, 32, 64, 128])
)
"""
OF_TASK = {
    'detection': """
val_evaluator = test_evaluator = dict(ann_file={root!r} + '/annotations/val.json')
train_dataloader.update(batch_size=4)
optim_wrapper['optimizer'].update(lr=6e-3)
model.update(
    train_cfg=dict(rcnn=dict(sampler=dict(num=16)), rpn_proposal=dict(nms_pre=200, max_per_img=50)),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)
""",
    'segmentation': """
val_dataloader.update(dataset=dict(val_dataloader['dataset'], data_prefix=_base_.train_dataloader.dataset.data_prefix))
model['neck'].update(out_channels=32)
model.update(decode_head=dict(in_channels=[32] * 4, channels=32))
""",
}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """Of digits that are larger and clearer than usual, so that they are learnt in half a minute."""
    folder = tmp_path_factory.mktemp('data') / 'scenes'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('SIDES', (24, 40)), ('CONTRASTS', (110, 150)), ('COUNTS', (2, 4))):
            patch.setattr(digit_scenes, name, value)
        digit_scenes.write_digit_scenes(folder, num_train=SCENES['detection'][1], num_val=NUM_VAL, size=48)
    return folder


def write_config(path, task, data_root):
    """The embedded config on other scenes, with a smaller network and for fewer epochs."""
    base = str(ROOT / 'configs' / CONFIGS[task])
    values = dict(base=base, root=str(data_root), count=SCENES[task][1], num_val=NUM_VAL, epochs=EPOCHS[task])
    path.write_text((SMALL + OF_TASK[task]).format(**values))
    return path


@pytest.fixture(scope='module', params=CONFIGS)
def trained(request, scenes, tmp_path_factory):
    """Task, config, work dir and output of a training."""
    work_dir = tmp_path_factory.mktemp(request.param)
    config = write_config(work_dir / 'config.py', request.param, scenes)
    done = call_tool('train.py', config, '--work-dir', work_dir, folder=work_dir)
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
    arguments = ['--work-dir', tmp_path, '--show-dir', pictures, '--interval', '6', '--out', predictions]
    done = call_tool('test.py', config, checkpoint, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert metric(task, done.stdout) == metric(task, output)
    assert len(mmengine.load(predictions)) == NUM_VAL
    assert sorted(path.name for path in pictures.iterdir()) == ['00001.png', '00007.png', '00013.png']
    shown = np.array(Image.open(pictures / '00007.png').convert('RGB')).astype(int)
    scene = np.array(Image.open(scenes / SCENES[task][0] / '00007.png')).astype(int)
    # The scene with the truth beside the scene with the prediction; boxes are shown from a score of 0.3 on.
    assert shown.shape == (48, 96, 3)
    assert np.abs(shown[:, :48] - scene).max() > 0
    assert task == 'detection' or np.abs(shown[:, 48:] - scene).max() > 0


def test_testing_in_bfloat16(trained, tmp_path):
    task, config, work_dir, output = trained
    checkpoint = work_dir / f'epoch_{EPOCHS[task]}.pth'
    done = call_tool('test.py', config, checkpoint, '--work-dir', tmp_path, '--amp', 'bfloat16', folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert metric(task, done.stdout) == pytest.approx(metric(task, output), rel=0.25)  # of a few objects


only_detectors = pytest.mark.parametrize('trained', ['detection'], indirect=True)


@only_detectors
def test_exported_detectors_have_the_figures_of_their_checkpoint(trained, tmp_path):
    _, config, work_dir, output = trained
    file = tmp_path / 'model.onnx'
    run_here('deployment/export.py', config, work_dir / 'epoch_2.pth', file)
    done = call_tool('test.py', config, file, '--work-dir', tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    for key in ('coco/bbox_mAP_50', 'coco/segm_mAP_50'):
        found, expected = (float(re.findall(rf'{key}: +([\d.]+)', text)[-1]) for text in (done.stdout, output))
        assert found == pytest.approx(expected, rel=0.01) and found > 0


@only_detectors
def test_detectors_average_mirrored_images(trained, tmp_path):
    _, config, work_dir, _ = trained
    arguments = [work_dir / 'epoch_2.pth', '--work-dir', tmp_path, '--tta']
    with pytest.raises(SystemExit, match='--tta: mmdet merges boxes only, but this model has a mask head'):
        run_here('test.py', config, *arguments)
    # Unlike COCO's, this metric takes the truth from the averaged sample.
    voc = "dict(_delete_=True, _scope_='mmdet', type='VOCMetric', metric='mAP')"
    changed = tmp_path / 'voc.py'
    changed.write_text(
        f'_base_ = [{str(config)!r}]\ntest_evaluator = {voc}\nmodel = dict(roi_head=dict(mask_head=None))\n'
    )
    done = call_tool('test.py', changed, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert float(re.findall(r'pascal_voc/mAP: +([\d.]+)', done.stdout)[-1]) >= LEAST['detection'][1] / 2


def test_resuming_from_the_last_checkpoint_in_bfloat16(trained, tmp_path):
    task, config, work_dir, _ = trained
    last = EPOCHS[task]
    shutil.copy(work_dir / f'epoch_{last}.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / f'epoch_{last}.pth'))
    more = [f'train_cfg.max_epochs={last + 1}', 'train_dataloader.dataset.indices=16', 'param_scheduler=None']
    arguments = ['--work-dir', tmp_path, '--resume', '--amp', 'bfloat16', '--no-validate', '--cfg-options', *more]
    done = call_tool('train.py', config, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f'Epoch(train) [{last + 1}]' in done.stdout and 'Epoch(train) [1]' not in done.stdout
    assert (tmp_path / f'epoch_{last + 1}.pth').is_file()


def test_broken_data_are_named(scenes, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(scenes, data)
    work_dir = ['--work-dir', tmp_path / 'out']
    configs = {task: write_config(tmp_path / f'{task}.py', task, data) for task in CONFIGS}
    for labels in (data / 'labels' / 'train').iterdir():
        Image.fromarray(np.full((48, 48), 17, np.uint8)).save(labels)
    with pytest.raises(SystemExit, match=rf'^Error: {data}/labels/train/\d+.png must contain labels from 0 to 10'):
        run_here('train.py', configs['segmentation'], *work_dir)
    for image in (data / 'train').iterdir():
        image.unlink()
    with pytest.raises(SystemExit, match=rf'^Error: no image file at {data}/train/\d+.png'):
        run_here('train.py', configs['detection'], *work_dir)
