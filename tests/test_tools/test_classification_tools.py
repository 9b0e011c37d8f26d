"""The tools as users type them, on real digits with a small network."""

import json
import multiprocessing
import re

import mmengine
import pytest
import torch
from helpers import ROOT, SMALL_CONFIG
from helpers.exports import write_checkpoint
from helpers.runs import CONFIG as TINY_CONFIG
from helpers.runs import call_tool, run_here
from PIL import Image

from mmstrip.engine.work_dir import lock_work_dir
from mmstrip.utils.config import load_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir of tools/train.py, and what it printed."""
    work_dir = tmp_path_factory.mktemp('digits')
    done = call_tool('train.py', SMALL_CONFIG, '--work-dir', work_dir, folder=work_dir)
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
    checkpoint, out, pictures = (work_dir / 'last_checkpoint').read_text(), tmp_path / 'out.pkl', tmp_path / 'pictures'
    options = ['--work-dir', tmp_path, '--out', out, '--show-dir', pictures, '--interval', 100]
    done = call_tool('test.py', SMALL_CONFIG, checkpoint, *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    top1 = re.search(r'Test (top-1 .*)', output).group(1)
    assert f'Test {top1}' in done.stdout
    predictions = mmengine.load(out)
    assert len(predictions) == 360
    right = sum(int(sample['pred_label']) == int(sample['gt_label']) for sample in predictions)
    assert f'({right} of 360 images)' in top1
    drawn = list(pictures.glob('*.png'))
    assert len(drawn) == 4 and min(Image.open(drawn[0]).size) >= 200


def test_test_time_augmentation(trained, tmp_path):
    """Also of a config that averages weights, whose hook would look for those of the wrapper."""
    averaged = tmp_path / 'averaged.py'
    averaged.write_text(f"_base_ = [{str(SMALL_CONFIG)!r}]\ndefault_hooks = dict(ema=dict(type='EMAHook'))\n")
    arguments = [trained[0] / 'epoch_4.pth', '--work-dir', tmp_path, '--tta']
    done = call_tool('test.py', averaged, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert float(re.search(r'Test top-1 ([\d.]+)%', done.stdout).group(1)) > 90
    with pytest.raises(SystemExit, match='no tta_model'):
        run_here('test.py', SMALL_CONFIG, *arguments, '--cfg-options', 'tta_model=None')


def test_auto_scale_lr(tmp_path):
    few = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=128', 'param_scheduler=None']
    options = ['auto_scale_lr.base_batch_size=128', 'default_hooks.logger.interval=1', *few]
    arguments = ['--auto-scale-lr', '--no-validate', '--no-accelerate', '--cfg-options', *options]
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


OTHER_ARCH = 'strip-mlp-tiny-light_1xb64_digits-32px.py'
TRAIN, TEST = ['train.py', 'SMALL', '--work-dir', 'TMP'], ['test.py', 'SMALL', 'TRAINED', '--work-dir', 'TMP']
THEIRS, OURS = ['test.py', 'SMALL', 'TMP/theirs.pth', *TEST[3:]], ['test.py', 'SMALL', 'TMP/ours.pth', *TEST[3:]]
DAMAGED, OPTIONS = [*TRAIN[:2], '--work-dir', 'TMP/damaged', '--resume'], [*TRAIN, '--cfg-options']
CIFAR10 = [f'train_dataloader.dataset.{option}' for option in ('type=CIFAR10', 'data_root=TMP', 'download=False')]
NO_GPU = '--amp float16 needs a GPU, but none is available; use --amp bfloat16 on CPUs'


@pytest.mark.parametrize(
    'words, command',
    [
        (
            'no config at .*tinny.*; did you mean strip-mlp-tiny_8xb128_in1k.py',
            ['train.py', 'CONFIGS/strip-mlp-tinny_8xb128_in1k.py'],
        ),
        (
            'train_dataloader.dataset.data_root: no folder .*/gone',
            ['train.py', 'CONFIGS/strip-mlp-tiny_8xb128_in1k.py', *TRAIN[2:], '--cfg-options']
            + ['train_dataloader.dataset.data_root=TMP/gone'],
        ),
        ('no checkpoint at .*/none.pth', ['test.py', 'SMALL', 'TMP/none.pth', *TEST[3:]]),
        ('--resume: no checkpoint at .*/none.pth', [*TRAIN, '--resume', 'TMP/none.pth']),
        (
            'the checkpoint does not fit this StripMLP: it has embed_dims=32',
            ['test.py', f'CONFIGS/{OTHER_ARCH}', *TEST[2:]],
        ),
        ("contains none of the model's", THEIRS),
        (
            'ours.pth does not fit the model: it has tensors of other shapes: size mismatch for head.fc.weight',
            [*OURS, '--cfg-options', 'model.head.num_classes=7'],
        ),
        (
            'strip_width must be an odd positive int, but got 4',
            [*TRAIN, '--cfg-options', 'model.backbone.strip_width=4'],
        ),
        ('--out must end in .pkl', [*TEST, '--out', 'TMP/out.json']),
        (NO_GPU, [*TEST, '--amp', 'float16']),
        ('--out must be a file, but .*/folder.pkl is a folder', [*TEST, '--out', 'TMP/folder.pkl']),
        ("File exists: '.*/ours.pth'", [*TEST, '--show-dir', 'TMP/ours.pth']),
        ("Not a directory: '.*/ours.pth/work'", [*TRAIN[:2], '--work-dir', 'TMP/ours.pth/work']),
        ('.*/ours.pth cannot be resumed from: it has no optimizer state', [*TRAIN, '--resume', 'TMP/ours.pth']),
        ('no checkpoint in .*/damaged can be read: .*/epoch_1.pth cannot be loaded: it is damaged', DAMAGED),
        ('torchrun starts: RANK must be a number, but is not set', [*TRAIN, '--launcher', 'pytorch']),
        ('srun starts: SLURM_PROCID must be a number, but is not set', [*TEST, '--launcher', 'slurm']),
        ('Foo is not in the mmpretrain::dataset registry', [*OPTIONS, 'train_dataloader.dataset.type=Foo']),
        ("unexpected keyword argument 'foo'", [*OPTIONS, 'model.backbone.foo=1']),
        ('.*no optimizer is registered as .Foo', [*OPTIONS, 'optim_wrapper.optimizer.type=Foo']),
        ('Invalid learning rate: -1', [*OPTIONS, 'optim_wrapper.optimizer.lr=-1']),
        ("AdamW cannot be built: '<=' not supported", [*OPTIONS, 'optim_wrapper.optimizer.lr=abc']),
        ('mmstrip.ResumableEpochLoop cannot be built: .*abc', [*OPTIONS, 'train_cfg.max_epochs=abc']),
        ('custom_hooks must be a list of dicts, but got 3', [*OPTIONS, 'custom_hooks=3']),
        ('train_dataloader.sampler must be a dict, but is 3', [*OPTIONS, 'train_dataloader.sampler=3']),
        ('val_dataloader.dataset.pipeline must be a list, but is 3', [*OPTIONS, 'val_dataloader.dataset.pipeline=3']),
        ("log_level must be DEBUG, INFO, WARNING or ERROR, but is 'foo'", [*OPTIONS, 'log_level=foo']),
        ("randomness.seed must be an int from 0 .*, but is 'abc'", [*OPTIONS, 'randomness.seed=abc']),
        ("mp_start_method must be one of .*, but is 'foo'", [*OPTIONS, 'env_cfg.mp_cfg.mp_start_method=foo']),
        ('load_from must be a path, but is 3', [*OPTIONS, 'load_from=3']),
        ('log processor should be a LogProcessor object or dict', [*OPTIONS, 'log_processor=3']),
        ('val_interval must be a number of at least 1, but is 0', [*OPTIONS, 'train_cfg.val_interval=0']),
        ("checkpoint.interval must be .*, but is 'a'", [*OPTIONS, 'default_hooks.checkpoint.interval=a']),
        ("OneCycleLR cannot be built: .*'abcabc", [*OPTIONS, 'param_scheduler.0.end=abc']),
        ('Cannot find CIFAR10 dataset in TMP', [*OPTIONS, 'train_dataloader.dataset._delete_=True', *CIFAR10]),
    ],
)
def test_bad_input_is_named(words, command, trained, tmp_path):
    torch.save({'model': {'patch_embed.weight': torch.zeros(80, 3, 4, 4)}}, tmp_path / 'theirs.pth')
    write_checkpoint(load_config(SMALL_CONFIG), tmp_path / 'ours.pth')
    places = dict(SMALL=SMALL_CONFIG, TMP=tmp_path, TRAINED=trained[0] / 'epoch_4.pth')
    places['CONFIGS'] = ROOT / 'configs/strip_mlp'
    for name, place in places.items():
        words, *command = (re.sub(rf'\b{name}\b', str(place), word) for word in (words, *command))
    (tmp_path / 'folder.pkl').mkdir()
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged' / 'epoch_1.pth').write_text('nothing')
    with pytest.raises(SystemExit, match=f'^Error: .*{words}'):
        run_here(*command)
    assert (tmp_path / 'damaged' / 'epoch_1.pth').read_text() == 'nothing'


def test_a_rank_beyond_the_processes_is_refused(tmp_path, monkeypatch):
    """Or it would wait for PyTorch's timeout."""
    for name, value in dict(RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit, match='^Error: RANK must be below the number of processes, 2, but is 2$'):
        run_here('train.py', TINY_CONFIG, '--work-dir', tmp_path, '--launcher', 'pytorch')


def test_a_work_dir_in_use_is_refused(tmp_path):
    with multiprocessing.get_context('fork').Pool(1) as pool:
        pool.apply(lock_work_dir, [tmp_path])
        with pytest.raises(SystemExit, match=f'^Error: {tmp_path} is in use by another training'):
            run_here('train.py', TINY_CONFIG, '--work-dir', tmp_path)


@pytest.mark.parametrize('place, error', [('StripMLP.__init__', ValueError), ('StripMLP.forward', RuntimeError)])
def test_errors_of_the_program_keep_their_traceback(place, error, tmp_path, monkeypatch):
    def fail(*_, **__) -> None:
        raise error('a bug')

    monkeypatch.setattr(f'mmstrip.models.{place}', fail)
    with pytest.raises(error, match='a bug'):
        run_here('train.py', TINY_CONFIG, '--work-dir', tmp_path, '--no-accelerate')
