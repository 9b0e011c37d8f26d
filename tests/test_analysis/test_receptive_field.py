"""Effective receptive fields: known ones, backbones of any toolbox, and the tool."""

import json

import numpy as np
import pytest
import torch
from helpers import DATA, ROOT
from helpers.runs import run_here
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from torch import nn

from mmstrip.analysis.receptive_field import find_images, load_backbone, read_images, receptive_field

CONFIG = DATA / 'digits_tiny.py'
SEGMENTOR = ROOT / 'configs' / 'segmentation' / 'strip-mlp-nano_fpn_1xb8_digit-scenes.py'


def test_three_convolutions_of_ones():
    """The field is a box convolved with itself: 1 3 6 7 6 3 1 in each direction."""
    layers = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    field = receptive_field(nn.Sequential(*layers), torch.rand(9, 3, 20, 31))  # more than a batch
    line = np.array([1, 3, 6, 7, 6, 3, 1]) / 27
    expected = np.zeros((20, 31))
    expected[7:14, 12:19] = np.outer(line, line)
    assert field.center == (10.5, 15.5) and field.stride == 1
    np.testing.assert_allclose(field.contributions, expected, atol=1e-7)
    assert [field.side(share) for share in (0.05, 0.4, 0.5, 0.9, 1)] == [1, 3, 5, 7, 7]
    assert field.area(1) == 49 / 620


def test_patches_and_squares_that_leave_the_image():
    patches = nn.Conv2d(3, 2, 4, stride=4)
    nn.init.ones_(patches.weight)
    field = receptive_field(patches, torch.rand(1, 3, 24, 24))  # 6 x 6 features: the one at 3, 3
    assert field.center == (14, 14) and field.stride == 4
    assert [field.side(share) for share in (0.25, 0.3, 1)] == [2, 4, 4]
    everywhere = receptive_field(nn.AdaptiveAvgPool2d(1), torch.rand(1, 3, 24, 24))
    assert everywhere.side(1) == 24 and everywhere.area(1) == 1
    corner = nn.Sequential(
        nn.ConstantPad2d((8, 0, 8, 0), 0.0), patches
    )  # the features lie 8 pixels further up and left
    assert receptive_field(corner, torch.rand(1, 3, 16, 16)).area(1) < 1


def test_backbones_of_any_toolbox_and_stage():
    images = torch.randint(0, 256, (2, 3, 64, 64)).float()
    for text, stage, stride in (
        (str(CONFIG), None, 32),
        (str(CONFIG), 1, 8),
        (str(SEGMENTOR), None, 32),
        ('mmpretrain.SwinTransformer:arch=tiny,pad_small_map=true', 2, 16),
        ('R18=mmpretrain.ResNet:depth=18', 0, 4),
    ):
        item = load_backbone(text, stage=stage)
        field = receptive_field(item.backbone, item.normalize(images))
        assert item.stage == (3 if stage is None else stage)
        assert field.stride == stride and field.side(0.2) <= field.side(0.5) <= field.side(0.99)
    assert item.label == 'R18'


def test_images_are_normalised_as_the_config_says():
    images = torch.tensor([255.0, 128.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    grey = load_backbone(str(CONFIG))  # BGR, one mean for all channels
    assert grey.normalize(images)[0, :, 0, 0].tolist() == pytest.approx([(x - 77.9) / 95.9 for x in (0, 128, 255)])
    rgb = load_backbone('mmpretrain.ResNet:depth=18')
    assert rgb.normalize(images)[0, 0, 0, 0].item() == pytest.approx((255 - 123.675) / 58.395, abs=1e-5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pictures of several shapes in a folder, one below and a link to that, and another file."""
    folder = tmp_path_factory.mktemp('pictures')
    generator = np.random.default_rng(0)
    (folder / 'more').mkdir()
    (folder / 'linked').symlink_to(folder / 'more')
    for name, shape in (('a.png', (40, 60, 3)), ('b.JPG', (90, 70, 3)), ('more/c.png', (30, 30))):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / 'notes.txt').write_text('no picture')
    return folder


def test_images_are_found_and_cut(folder):
    files = find_images([folder], 50)
    assert [file.name for file in files] == ['a.png', 'b.JPG', 'c.png', 'c.png']
    assert [file.name for file in find_images([folder], 2)] == ['a.png', 'c.png']
    images = read_images(files, 32)
    assert images.shape == (4, 3, 32, 32) and 0 <= images.min() < images.max() <= 255


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Of the backbone of CONFIG, in a classifier: other weights than those of seed 0."""
    torch.manual_seed(7)
    backbone = MODELS.build(Config.fromfile(CONFIG).model.backbone)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in backbone.state_dict().items()}), path)
    return path


def test_tool_compares_models_side_by_side(folder, checkpoint, tmp_path, capsys):
    models = (f'random={CONFIG}', 'none', f'filled={CONFIG}', checkpoint, 'mmpretrain.ResNet:depth=18', 'none')
    options = ('--size', 64, '--stage', 2, '--num-images', 2, '--out', tmp_path / 'out')
    run_here('analysis_tools/erf.py', *models, folder, *options)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / 'out' / 'receptive_field.json').read_text())
    assert [result['label'] for result in results] == ['random', 'filled', 'ResNet-18']
    assert all((r['stage'], r['stride'], r['images'], r['size']) == (2, 16, 2, [64, 64]) for r in results)
    for result in results:
        sides, areas = result['sides'], result['areas']
        assert list(sides) == list(areas) == ['20', '30', '50', '99'] and sides['20'] <= sides['99']
        assert f'{sides["50"]:g} ({areas["50"]:.1%})' in printed
    with Image.open(tmp_path / 'out' / 'receptive_field.png') as picture:
        assert picture.width > 800
    images = read_images(find_images([folder], 1), 32)
    backbones = [load_backbone(str(CONFIG), weights) for weights in (None, None, str(checkpoint))]
    fields = [receptive_field(item.backbone, item.normalize(images)).contributions for item in backbones]
    assert np.array_equal(fields[0], fields[1]) and not np.allclose(fields[0], fields[2])


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['CONFIG', 'none', 'nowhere'], 'no image file or folder at nowhere'),
        (['CONFIG', 'none', 'EMPTY'], 'no image (.jpg, '),
        (['CONFIG', 'nowhere.pth', 'IMAGES'], 'no checkpoint at nowhere.pth'),
        (['CONFIG', 'none', 'IMAGES', '--stage', '4'], 'digits_tiny has no stage 4: '),
        (['CONFIG@deploy', 'none', 'IMAGES'], "digits_tiny.py@deploy' is registered; use a scope"),
        (['mmpretrain.ResNet:depth=18', 'CHECKPOINT', 'IMAGES'], 'does not fit the ResNet: it lacks'),
        (['mmpretrain.SwinTransformer', 'none', 'IMAGES'], 'SwinTransformer fails on images (4, 3, 32, 32): '),
        (['mmpretrain.ResNet:depth=51', 'none', 'IMAGES'], 'mmpretrain.ResNet cannot be built: invalid depth 51'),
        (['mmpretrain.ResNet:deep=50', 'none', 'IMAGES'], "unexpected keyword argument 'deep'"),
        (['mmpretrain.ResNet:depth', 'none', 'IMAGES'], "arguments must be KEY=VALUE, but got 'depth'"),
        (['CONFIG', 'none', 'BAD'], 'bad.jpg is not a readable image: unknown image format'),
        (['CONFIG', 'none'], 'give pairs of CONFIG and CHECKPOINT (or none), then IMAGES, but got 2 arguments'),
    ],
)
def test_errors_in_one_sentence(arguments, words, folder, checkpoint, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.jpg').write_text('no image')
    names = dict(CONFIG=str(CONFIG), CHECKPOINT=str(checkpoint), IMAGES=str(folder), EMPTY=str(tmp_path / 'empty'))
    names['BAD'] = str(tmp_path / 'bad.jpg')
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        run_here('analysis_tools/erf.py', *arguments, '--size', 32, '--out', tmp_path / 'out')
    assert words in f'{error.value} {capsys.readouterr().err}'


def test_what_gives_no_maps_says_so():
    with pytest.raises(ValueError, match=r'Flatten must return feature maps \(N, C, h, w\), but returns \(1, 48\)'):
        receptive_field(nn.Flatten(), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match='gradient of the central feature is zero'):
        receptive_field(nn.Threshold(2.0, 0.0), torch.rand(1, 3, 4, 4))
