"""The faster training transforms draw the random numbers of mmpretrain's and compute its values."""

import copy

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT
from mmcv.transforms import Compose, RandomFlip
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.datasets import RandAugment, RandomErasing, RandomResizedCrop
from mmpretrain.datasets.transforms.auto_augment import RANDAUG_POLICIES
from mmpretrain.registry import TRANSFORMS
from PIL import Image

from mmstrip import datasets
from mmstrip.engine.sampler import SeededSampler

CONFIG = ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py'
OURS = ('RandomResizedCrop', 'RandomFlip', 'RandAugment', 'RandomErasing', 'ToPlanes')


def photo(height, width, channels=3, seed=0):
    """Smooth, with some noise, so that values are many and neighbors alike."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (5, 4, channels)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


IMAGES = dict(
    photo=photo(120, 90),
    dark=photo(60, 64) // 9,
    grey=photo(50, 70, 1).repeat(3, axis=2),
    black=np.zeros((16, 16, 3), np.uint8),
    two=np.uint8([[[10, 10, 9], [10, 200, 9]]] * 3),
    pixel=np.uint8([[[3, 200, 77]]]),
    line=photo(1, 300),
    column=photo(700, 2),
)


def both(pairs, img, seed, **results):
    """Results of two transforms with one seed, after which the random states must be equal."""
    given = []
    for transform in pairs:
        np.random.seed(seed)
        given.append((transform(dict(results, img=img.copy())), np.random.random()))
    assert given[0][1] == given[1][1]
    return given[0][0], given[1][0]


def assert_equal(pairs, img, seeds=range(12), **results):
    for seed in seeds:
        found, expected = both(pairs, img, seed, **results)
        assert found.keys() == expected.keys() and found['img'].dtype == expected['img'].dtype
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f'{key}, seed {seed}')


@pytest.mark.parametrize('img', IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize('policy', RANDAUG_POLICIES['timm_increasing'], ids=lambda policy: policy['type'])
def test_operations(policy, img):
    init_default_scope('mmpretrain')
    settings = dict(num_policies=2, magnitude_level=9, magnitude_std=0.5)
    settings.update(policies=[policy], hparams=dict(pad_val=(104, 116, 124), interpolation='bicubic'))
    assert_equal([kind(**settings) for kind in (datasets.RandAugment, RandAugment)], img)


@pytest.mark.parametrize(
    'policy',
    [
        dict(type='Solarize', thr=77.5, prob=1.0),
        dict(type='SolarizeAdd', magnitude=90, thr=200, prob=1.0),
        dict(type='Brightness', magnitude=-1.5, prob=1.0),
        dict(type='Contrast', magnitude=2.5, prob=1.0),
        dict(type='Contrast', magnitude=0.0, prob=1.0),
        dict(type='Equalize', prob=0.0),
        dict(type='torchvision/Lambda', lambd=lambda img: 255 - img),
    ],
    ids=lambda policy: policy['type'],
)
def test_operations_of_fixed_strength_and_of_others(policy):
    init_default_scope('mmpretrain')
    ours, theirs = (kind([policy], 2, 5) for kind in (datasets.RandAugment, RandAugment))
    assert_equal([ours, theirs], IMAGES['photo'])


def test_operations_on_images_that_are_not_eight_bit_color():
    init_default_scope('mmpretrain')
    pair = [kind([dict(type='Solarize', thr=70, prob=1.0)], 1, 5) for kind in (datasets.RandAugment, RandAugment)]
    for img in (photo(20, 30, 1)[..., 0], photo(20, 30, 4), photo(20, 30).astype(np.float32)):
        assert_equal(pair, img)


def test_an_operation_may_drop_its_image():
    class Drop:
        def __call__(self, results):
            return None

    init_default_scope('mmpretrain')
    augment = datasets.RandAugment([dict(type='Invert')], 2, 5)
    augment.transforms = [Drop()]
    assert augment(dict(img=IMAGES['photo'])) is None


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('img', [*IMAGES.values(), photo(900, 30), photo(300, 400, 1)[..., 0]])
def test_crops_differ_by_rounding(img, interpolation):
    settings = dict(scale=(48, 64), interpolation=interpolation, backend='pillow')
    pair = [kind(**settings) for kind in (datasets.RandomResizedCrop, RandomResizedCrop)]
    for seed in range(12):
        found, expected = both(pair, img, seed)
        assert found['img_shape'] == expected['img_shape'] == found['img'].shape
        assert found['img'].dtype == np.uint8 and found['img'].flags.c_contiguous
        difference = np.abs(found['img'].astype(int) - expected['img'])
        assert difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize(
    ['img', 'settings'],
    [
        (IMAGES['photo'], dict(interpolation='bicubic')),
        (IMAGES['photo'], dict(interpolation='lanczos', backend='pillow')),
        (photo(50, 60, 4), dict(interpolation='bicubic', backend='pillow')),
        (photo(50, 60).astype(np.float32), dict(interpolation='bicubic')),
    ],
)
def test_other_crops_are_those_of_mmpretrain(img, settings):
    assert_equal([kind(scale=32, **settings) for kind in (datasets.RandomResizedCrop, RandomResizedCrop)], img)


def test_an_image_in_memory_stays_as_it_is():
    """Also one that may not be written, or is a view with negative strides, as Pillow's decoder gives it."""
    init_default_scope('mmpretrain')
    img = photo(32, 32)
    img.flags.writeable = False
    pipeline = Compose(Config.fromfile(CONFIG).train_pipeline[1:-1])
    pipeline.transforms[0].scale = (32, 32)
    for seed in range(30):
        np.random.seed(seed)
        assert pipeline(dict(img=img))['img'].shape == (32, 32, 3)
    np.testing.assert_array_equal(img, photo(32, 32))
    pair = [kind(16, interpolation='bicubic', backend='pillow') for kind in (datasets.RandomResizedCrop,) * 2]
    np.random.seed(0)
    found = pair[0](dict(img=photo(32, 32)[..., ::-1]))['img']
    np.random.seed(0)
    np.testing.assert_array_equal(found, pair[1](dict(img=photo(32, 32)[..., ::-1].copy()))['img'])


@pytest.mark.parametrize(
    'settings',
    [
        dict(prob=0.5),
        dict(prob=1.0, direction='vertical'),
        dict(prob=0.6, direction=['horizontal', 'diagonal']),
        dict(prob=[0.2, 0.3, 0.2], direction=['horizontal', 'vertical', 'diagonal']),
    ],
)
def test_flips(settings):
    pair = [kind(**settings) for kind in (datasets.RandomFlip, RandomFlip)]
    boxes = np.float32([[1, 2, 30, 40]])
    others = photo(5, 6, 1), photo(5, 6, 1)[..., 0], photo(5, 6, 7), photo(5, 6) > 9, photo(5, 6)[None], photo(5, 6)[:0]
    for img in (photo(50, 60), *others):
        assert_equal(pair, img, gt_bboxes=boxes, gt_seg_map=photo(50, 60)[..., 0])
    np.random.seed(1)
    assert pair[0](dict(img=photo(5, 6)))['img'].flags.c_contiguous


@pytest.mark.parametrize(
    'settings',
    [
        dict(mode='rand', fill_color=(103.5, 116.3, 123.7), fill_std=(57.4, 57.1, 58.4)),
        dict(mode='rand', fill_color=-300, fill_std=200),
        dict(mode='rand'),
        dict(mode='const', fill_color=9),
    ],
)
def test_erasing(settings):
    pair = [kind(erase_prob=0.8, **settings) for kind in (datasets.RandomErasing, RandomErasing)]
    for img in (IMAGES['photo'], IMAGES['pixel'], IMAGES['line'], photo(9, 9).astype(np.float32)):
        assert_equal(pair, img)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Images of all kinds that Pillow writes."""
    folder = tmp_path_factory.mktemp('images')
    picture = Image.fromarray(photo(70, 110))
    for mode in ('RGB', 'L', 'CMYK'):
        picture.convert(mode).save(folder / f'{mode}.jpg')
    for mode in ('RGB', 'RGBA', 'L', 'LA', 'P', '1'):
        picture.convert(mode).save(folder / f'{mode}.png')
    Image.fromarray(photo(70, 110)[..., 0].astype(np.uint16) * 257).save(folder / '16 bits.png')
    Image.fromarray(photo(3, 300)).save(folder / 'wide.png')
    Image.fromarray(photo(1, 1)).save(folder / 'pixel.png')
    return sorted(folder.iterdir())


def test_the_pipeline_computes_what_that_of_mmpretrain_does(files):
    """But for the crop, of which both take the same."""
    init_default_scope('mmpretrain')
    ours = Config.fromfile(CONFIG).train_pipeline
    assert [step.type for step in ours[1:-1]] == [f'mmstrip.{name}' for name in OURS]
    theirs = copy.deepcopy(ours)
    del theirs[-2]
    for step in theirs[2:-1]:
        step.type = step.type.removeprefix('mmstrip.')
    assert len(files) == 12
    for seed, file in enumerate(files * 4):
        found, expected = (_run(pipeline, str(file), seed) for pipeline in (ours, theirs))
        torch.testing.assert_close(found['inputs'], expected['inputs'], rtol=0, atol=0)
        assert found['data_samples'].metainfo == expected['data_samples'].metainfo


def _run(pipeline, file, seed):
    np.random.seed(seed)
    return Compose(pipeline)(dict(img_path=file, gt_label=1))


class Files(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files, self.pipeline = files, Compose(Config.fromfile(CONFIG).train_pipeline)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.pipeline(dict(img_path=str(self.files[index]), gt_label=index))


def test_images_of_a_resumed_run_are_those_of_an_undisturbed_one(files):
    """For any number of workers."""
    init_default_scope('mmpretrain')

    def batches(workers, first):
        loader = dict(batch_size=3, num_workers=workers, collate_fn=dict(type='default_collate'))
        loader['sampler'] = dict(type=SeededSampler, sampler=dict(type='InfiniteSampler', shuffle=True))
        loader = Runner.build_dataloader(dict(loader, dataset=Files(files)), seed=4)
        loader.sampler.skip(3 * first)
        return [batch['inputs'] for batch, _ in zip(loader, range(4 - first))]

    undisturbed = batches(0, 0)
    for workers, first in ((2, 0), (0, 2), (2, 2)):
        for found, expected in zip(batches(workers, first), undisturbed[first:], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_toolboxes_find_them_by_name():
    for scope in ('mmpretrain', 'mmdet'):
        init_default_scope(scope)
        for name in OURS:
            assert TRANSFORMS.get(f'mmstrip.{name}') is getattr(datasets, name)
