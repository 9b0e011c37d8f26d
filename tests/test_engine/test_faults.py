"""Bad data, bad losses and checkpoints that want to run code."""

import re
import shutil

import pytest
import torch
from helpers import SMALL_CONFIG, Malicious
from helpers.runs import CONFIG, run_here, train_here
from sklearn.datasets import load_digits

from mmstrip.converters.official import convert_official_checkpoint
from mmstrip.converters.reparameterize import convert_to_deploy
from mmstrip.utils.errors import sentence_of


@pytest.fixture
def images(tmp_path):
    """A config's options for 24 digits as PNG files, of which two are damaged and one is missing."""
    import mmcv

    data, target = load_digits(return_X_y=True)
    for i in range(24):
        mmcv.imwrite((data[i].reshape(8, 8, 1) * 15).repeat(3, axis=2), str(tmp_path / f'{i}.png'))
    (tmp_path / '3.png').write_bytes((tmp_path / '3.png').read_bytes()[:60])
    (tmp_path / '7.png').write_text('no image')
    (tmp_path / '11.png').unlink()
    (tmp_path / 'list.txt').write_text('\n'.join(f'{i}.png {target[i]}' for i in range(24)))
    dataset = dict(_delete_=True, type='CustomDataset', data_prefix=str(tmp_path), ann_file=str(tmp_path / 'list.txt'))
    dataset['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]
    return {'train_dataloader.dataset': dataset, 'train_dataloader.num_workers': 2}


def test_bad_images_stop_or_are_skipped(images, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        train_here(tmp_path / 'work', images)
    assert 'is not a readable image' in str(raised.value) or 'no image file at' in str(raised.value)
    sentence = sentence_of(raised.value)  # of a worker's error, which has its traceback in its message
    assert any(sentence.startswith((f'{tmp_path}/{i}.png is', f'no image file at {tmp_path}/{i}')) for i in (3, 7, 11))
    assert '\n' not in sentence

    _, warnings = train_here(tmp_path / 'skip', {**images, 'skip_bad_images': 0.2})
    for number, words in ((3, 'is not a readable image'), (7, 'is not a readable image'), (11, 'no image file at')):
        assert f'{tmp_path}/{number}.png' in warnings and words in warnings
    assert 'Skipped (3 so far)' in warnings
    assert len(set((tmp_path / 'skip/bad_images.txt').read_text().splitlines())) == 3

    few = {**images, 'skip_bad_images': 0.1}
    with pytest.raises(
        ValueError, match='3 of 24 training images cannot be read, more than skip_bad_images=0.1 allows'
    ):
        train_here(tmp_path / 'few', few)
    for number in (3, 7, 11):
        shutil.copy(tmp_path / '0.png', tmp_path / f'{number}.png')
    train_here(tmp_path / 'few', few)  # in the same folder
    with pytest.raises(ValueError, match="skip_bad_images must be a fraction from 0 to 1, but got 'yes'"):
        train_here(tmp_path / 'word', {'skip_bad_images': 'yes'})


def test_invalid_loss_stops_before_it_is_saved(tmp_path):
    words = r'loss is (nan|inf) at iteration .*learning rate 1e\+30; images of the batch: digit_'
    with pytest.raises(FloatingPointError, match=words):
        train_here(tmp_path, {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': None, 'train_cfg.max_epochs': 4})
    for file in tmp_path.glob('*.pth'):
        weights = torch.load(file, weights_only=True)['state_dict']
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_no_tool_runs_code_of_a_checkpoint(tmp_path):
    evil, ran = tmp_path / 'evil.pth', tmp_path / 'ran'
    torch.save(dict(state_dict={}, meta=dict(evil=Malicious(ran)), optimizer={}), evil)
    refusal = f'{evil} cannot be loaded safely (weights_only=True): it contains '
    with pytest.raises(SystemExit, match=f'^Error: {re.escape(refusal)}.* --trust-checkpoints'):
        run_here('test.py', CONFIG, evil, '--work-dir', tmp_path / 'work')
    init = dict(type='Pretrained', checkpoint=str(evil), prefix='backbone.')
    for options in ({'load_from': str(evil)}, {'model.backbone.init_cfg': init}):
        with pytest.raises(ValueError, match=re.escape(refusal)):
            train_here(tmp_path / 'train', options)
    with pytest.raises(ValueError, match=re.escape(refusal)):
        train_here(tmp_path / 'resume', {'load_from': str(evil)}, resume=True)
    with pytest.raises(ValueError, match=re.escape(refusal)):
        convert_to_deploy(str(SMALL_CONFIG), str(evil), str(tmp_path / 'out.pth'))
    with pytest.raises(ValueError, match=re.escape(refusal)):
        convert_official_checkpoint(evil, tmp_path / 'out.pth')
    assert not ran.exists() and not (tmp_path / 'out.pth').exists()

    with pytest.raises(SystemExit, match=f"^Error: {evil} contains none of the model's"):
        run_here('test.py', CONFIG, evil, '--work-dir', tmp_path / 'work', '--trust-checkpoints')
    assert ran.exists()
