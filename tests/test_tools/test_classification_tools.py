"""The tools as users type them, on real digits with a small network."""

import json
import re

import mmengine
import pytest
import torch
from helpers import ROOT, SMALL_CONFIG, last_line, run_tool
from helpers.exports import write_checkpoint
from helpers.runs import CONFIG as TINY_CONFIG
from helpers.runs import call_tool
from PIL import Image

from mmstrip.utils.config import load_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir of tools/train.py, and what it printed."""
    work_dir = tmp_path_factory.mktemp('digits')
    done = run_tool('train.py', SMALL_CONFIG, '--work-dir', work_dir)
    assert done.returncode == 0, done.stdout
    return work_dir, done.stdout


def test_training_learns_digits_and_reports(trained):
    work_dir, output = trained
    top1 = float(re.search(r'Test top-1 ([\d.]+)%', output).group(1))
    assert top1 > 90
    assert output.count('Strip-MLP: 5 of 5 blocks') == 1
    assert re.search(r'eta: \d+:\d+:\d+', output)
    for name in ('curves', 'confusion_matrix', 'predictions'):
        (picture,) = work_dir.glob(f'*/{name}.png')
        assert str(picture) in output
        image = Image.open(picture).convert('L')
        # Not blank: something is drawn in the lower half too.
        assert len(set(image.crop((0, image.height // 2, *image.size)).tobytes())) > 20
    assert str(work_dir / 'epoch_4.pth') in output


def test_testing_gives_the_same_figures_and_files(trained, tmp_path):
    work_dir, output = trained
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    done = run_tool(
        'test.py',
        SMALL_CONFIG,
        checkpoint,
        '--work-dir',
        tmp_path,
        '--out',
        tmp_path / 'out.pkl',
        '--show-dir',
        tmp_path / 'pictures',
        '--interval',
        '100',
    )
    assert done.returncode == 0, done.stdout
    top1 = re.search(r'Test (top-1 .*)', output).group(1)
    assert f'Test {top1}' in done.stdout
    predictions = mmengine.load(tmp_path / 'out.pkl')
    assert len(predictions) == 360
    right = sum(int(sample['pred_label']) == int(sample['gt_label']) for sample in predictions)
    assert f'({right} of 360 images)' in top1
    pictures = list(tmp_path.glob('pictures/*.png'))
    assert len(pictures) == 4 and min(Image.open(pictures[0]).size) >= 200


def test_test_time_augmentation(trained, tmp_path):
    checkpoint = trained[0] / 'epoch_4.pth'
    done = call_tool('test.py', SMALL_CONFIG, checkpoint, '--work-dir', tmp_path, '--tta', folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert float(re.search(r'Test top-1 ([\d.]+)%', done.stdout).group(1)) > 90
    averaged = tmp_path / 'averaged.py'
    averaged.write_text(f"_base_ = [{str(SMALL_CONFIG)!r}]\ndefault_hooks = dict(ema=dict(type='EMAHook'))\n")
    same = call_tool('test.py', averaged, checkpoint, '--work-dir', tmp_path, '--tta', folder=tmp_path)
    assert re.search(r'Test top-1.*', same.stdout).group() == re.search(r'Test top-1.*', done.stdout).group()
    without = call_tool(
        'test.py',
        SMALL_CONFIG,
        checkpoint,
        '--work-dir',
        tmp_path,
        '--tta',
        '--cfg-options',
        'tta_model=None',
        folder=tmp_path,
    )
    assert 'no tta_model' in last_line(without.stdout)


FEW = ('train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=128')


def test_resuming_from_the_last_checkpoint(tmp_path):
    train = ['train.py', SMALL_CONFIG, '--work-dir', tmp_path]
    first = call_tool(*train, '--no-validate', '--cfg-options', *FEW, folder=tmp_path)
    assert first.returncode == 0, first.stdout
    options = ['--cfg-options', *FEW, 'train_cfg.max_epochs=2']
    second = call_tool(*train, '--resume', '--no-validate', *options, folder=tmp_path)
    assert second.returncode == 0, second.stdout
    assert 'Epoch(train) [2]' in second.stdout and 'Epoch(train) [1]' not in second.stdout
    assert 'Epoch(val)' not in second.stdout
    assert (tmp_path / 'epoch_2.pth').is_file()


def test_auto_scale_lr(tmp_path):
    options = ['auto_scale_lr.base_batch_size=128', 'default_hooks.logger.interval=1', 'param_scheduler=None']
    arguments = ['--auto-scale-lr', '--no-validate', '--no-accelerate', '--cfg-options', *FEW, *options]
    done = call_tool('train.py', SMALL_CONFIG, '--work-dir', tmp_path, *arguments, folder=tmp_path)
    assert done.returncode == 0 and 'Strip-MLP: ' not in done.stdout, done.stdout
    scalars = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert json.loads(scalars[-1])['lr'] == pytest.approx(3e-3 / 2)


def test_training_and_testing_in_bfloat16(tmp_path):
    """On a CPU; a run that began so resumes so."""
    few = ['randomness.seed=1', 'train_dataloader.dataset.indices=8']
    train = ['train.py', TINY_CONFIG, '--work-dir', tmp_path, '--no-validate', '--cfg-options', *few]
    first = call_tool(*train, 'train_cfg.max_epochs=1', '--amp', 'bfloat16', folder=tmp_path)
    assert first.returncode == 0, first.stdout
    second = call_tool(*train, 'train_cfg.max_epochs=2', '--amp', '--resume', folder=tmp_path)
    assert second.returncode == 0 and 'Epoch(train) [1]' not in second.stdout, second.stdout
    assert "type='mmstrip.BFloat16OptimWrapper'" in (tmp_path / 'digits_tiny.py').read_text()
    weights = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)['state_dict']
    assert torch.bfloat16 not in {value.dtype for value in weights.values()}
    checkpoint, out = tmp_path / 'epoch_2.pth', tmp_path / 'out.pkl'
    test = ['test.py', TINY_CONFIG, checkpoint, '--work-dir', tmp_path / 'test', '--out', out, '--amp', 'bfloat16']
    done = call_tool(*test, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "type='mmstrip.MixedPrecisionTestLoop'" in (tmp_path / 'test' / 'digits_tiny.py').read_text()
    assert {sample['pred_score'].dtype for sample in mmengine.load(out)} == {torch.float32}


class TestBadInput:
    """The last line is one sentence that names what is wrong."""

    def test_config_with_a_typo(self, tmp_path):
        done = call_tool('train.py', ROOT / 'configs/strip_mlp/strip-mlp-tinny_8xb128_in1k.py', folder=tmp_path)
        assert done.returncode != 0
        assert re.search(
            r'FileNotFoundError: no config at .*tinny.*; did you mean strip-mlp-tiny_8xb128_in1k.py',
            last_line(done.stdout),
        )

    def test_missing_data(self, tmp_path):
        config = ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py'
        done = call_tool(
            'train.py',
            config,
            '--work-dir',
            tmp_path,
            '--cfg-options',
            f'train_dataloader.dataset.data_root={tmp_path}/gone',
            folder=tmp_path,
        )
        assert re.search(
            r'FileNotFoundError: train_dataloader.dataset.data_root: no folder .*/gone', last_line(done.stdout)
        )

    def test_missing_checkpoints(self, tmp_path):
        done = call_tool('test.py', SMALL_CONFIG, tmp_path / 'none.pth', '--work-dir', tmp_path, folder=tmp_path)
        assert last_line(done.stdout) == f'FileNotFoundError: no checkpoint at {tmp_path / "none.pth"}'
        done = call_tool(
            'train.py', SMALL_CONFIG, '--work-dir', tmp_path, '--resume', tmp_path / 'none.pth', folder=tmp_path
        )
        assert last_line(done.stdout) == f'FileNotFoundError: --resume: no checkpoint at {tmp_path / "none.pth"}'

    def test_checkpoint_of_another_arch(self, trained, tmp_path):
        config = ROOT / 'configs/strip_mlp/strip-mlp-tiny-light_1xb64_digits-32px.py'
        done = call_tool('test.py', config, trained[0] / 'epoch_4.pth', '--work-dir', tmp_path, folder=tmp_path)
        assert 'the checkpoint is of another arch than this StripMLP: it has embed_dims=32' in last_line(done.stdout)

    def test_checkpoint_of_another_network(self, tmp_path):
        torch.save({'model': {'patch_embed.weight': torch.zeros(80, 3, 4, 4)}}, tmp_path / 'theirs.pth')
        done = call_tool('test.py', SMALL_CONFIG, tmp_path / 'theirs.pth', '--work-dir', tmp_path, folder=tmp_path)
        assert 'ValueError: the checkpoint lacks' in last_line(done.stdout)
        ours = write_checkpoint(load_config(SMALL_CONFIG), tmp_path / 'ours.pth')
        seven = ['--cfg-options', 'model.head.num_classes=7']
        done = call_tool('test.py', SMALL_CONFIG, ours, '--work-dir', tmp_path, *seven, folder=tmp_path)
        assert 'the checkpoint has tensors of other shapes: size mismatch for head.fc.weight' in last_line(done.stdout)

    def test_bad_argument_in_a_config(self, tmp_path):
        done = call_tool(
            'train.py',
            SMALL_CONFIG,
            '--work-dir',
            tmp_path,
            '--cfg-options',
            'model.backbone.strip_width=4',
            folder=tmp_path,
        )
        assert 'strip_width must be an odd positive int, but got 4' in last_line(done.stdout)

    def test_out_file_of_another_kind(self, trained, tmp_path):
        done = call_tool(
            'test.py', SMALL_CONFIG, trained[0] / 'epoch_4.pth', '--out', tmp_path / 'out.json', folder=tmp_path
        )
        assert '--out must end in .pkl' in last_line(done.stdout)

    def test_float16_on_a_cpu(self, tmp_path):
        for tool in (['train.py', SMALL_CONFIG], ['test.py', SMALL_CONFIG, __file__]):
            done = call_tool(*tool, '--work-dir', tmp_path, '--amp', 'float16', folder=tmp_path)
            assert last_line(done.stdout) == (
                'ValueError: --amp float16 needs a GPU, and there is none; CPUs take --amp bfloat16'
            )
