"""Bad data, bad losses and checkpoints that want to run code."""

import re
import shutil

import pytest
import torch
from helpers import SMALL_CONFIG, Malicious, last_line
from helpers.runs import CONFIG, call_tool, fail, finish, log
from sklearn.datasets import load_digits

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.converters.reparameterize import convert_to_deploy

PNG_CONFIG = """
_base_ = [{base!r}]
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
train_dataloader = dict(
    num_workers={workers},
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix={folder!r},
        ann_file={folder!r} + '/list.txt',
        pipeline=pipeline,
    ),
)
"""


@pytest.fixture
def images(tmp_path):
    """24 digits as PNG files, of which two are damaged and one is missing, and a config that trains on them."""
    import mmcv

    data, target = load_digits(return_X_y=True)
    for i in range(24):
        mmcv.imwrite((data[i].reshape(8, 8, 1) * 15).repeat(3, axis=2), str(tmp_path / f'{i}.png'))
    (tmp_path / '3.png').write_bytes((tmp_path / '3.png').read_bytes()[:60])
    (tmp_path / '7.png').write_text('no image')
    (tmp_path / '11.png').unlink()
    (tmp_path / 'list.txt').write_text('\n'.join(f'{i}.png {target[i]}' for i in range(24)))
    config = tmp_path / 'png.py'
    config.write_text(PNG_CONFIG.format(base=str(CONFIG), workers=2, folder=str(tmp_path)))
    return config


def test_bad_images_stop_or_are_skipped(images, tmp_path):
    work_dir = tmp_path / 'work'
    output = fail(work_dir, {}, config=images)
    assert 'is not a readable image' in output or 'no image file at' in output
    assert any(f'{tmp_path}/{i}.png' in output for i in (3, 7, 11))

    finish(tmp_path / 'skip', {'skip_bad_images': 0.2}, config=images)
    for number, words in ((3, 'is not a readable image'), (7, 'is not a readable image'), (11, 'no image file at')):
        assert f'{tmp_path}/{number}.png' in log(tmp_path / 'skip') and words in log(tmp_path / 'skip')
    assert 'Skipped, 3 so far' in log(tmp_path / 'skip')
    assert len(set((tmp_path / 'skip/bad_images.txt').read_text().splitlines())) == 3

    output = fail(tmp_path / 'few', {'skip_bad_images': 0.1}, config=images)
    assert '3 of 24 training images cannot be read, more than skip_bad_images=0.1 allows' in output
    for number in (3, 7, 11):
        shutil.copy(tmp_path / '0.png', tmp_path / f'{number}.png')
    finish(tmp_path / 'few', {'skip_bad_images': 0.1, 'train_cfg.max_epochs': 1}, config=images)  # in the same folder
    output = fail(tmp_path / 'word', {'skip_bad_images': 'yes'}, config=images)
    assert "skip_bad_images must be a share from 0 to 1, but got 'yes'" in output


def test_invalid_loss_stops_before_it_is_saved(tmp_path):
    output = fail(tmp_path, {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': None})
    assert 'FloatingPointError: loss is nan at iteration' in output or 'FloatingPointError: loss is inf' in output
    assert 'learning rate 1e+30; images of the batch: digit_' in output
    for file in tmp_path.glob('*.pth'):
        weights = torch.load(file, weights_only=True)['state_dict']
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_no_tool_runs_code_of_a_checkpoint(tmp_path):
    evil, ran = tmp_path / 'evil.pth', tmp_path / 'ran'
    torch.save(dict(state_dict={}, meta=dict(evil=Malicious(ran)), optimizer={}), evil)
    refusal = f'{evil} cannot be loaded as plain weights (weights_only=True): it holds '
    done = call_tool('test.py', CONFIG, evil, '--work-dir', tmp_path / 'work', folder=tmp_path)
    assert done.returncode == 1 and refusal in last_line(done.stdout)
    assert '--trust-checkpoints' in last_line(done.stdout)
    assert refusal in fail(tmp_path / 'resume', {'load_from': str(evil)})
    init = dict(type='Pretrained', checkpoint=str(evil), prefix='backbone.')
    assert refusal in fail(tmp_path / 'init', {'model.backbone.init_cfg': init})
    with pytest.raises(ValueError, match=re.escape(refusal)):
        convert_to_deploy(str(SMALL_CONFIG), str(evil), str(tmp_path / 'out.pth'))
    with pytest.raises(ValueError, match=re.escape(refusal)):
        convert_official_checkpoint(evil, tmp_path / 'out.pth')
    assert not ran.exists() and not (tmp_path / 'out.pth').exists()

    done = call_tool('test.py', CONFIG, evil, '--work-dir', tmp_path / 'work', '--trust-checkpoints', folder=tmp_path)
    assert ran.exists() and 'the checkpoint lacks' in last_line(done.stdout)
