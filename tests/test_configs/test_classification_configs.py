"""Every config of a classifier is whole and says the recipe."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.configs import COMPARED, CONFIGS, build_model, check_listed_size
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from PIL import Image

NUM_CLASSES = dict(
    in1k=1000, cifar10=10, cifar100=100, caltech101=101, flowers102=102, pets=37, cars=196, digits=10, fashion=10
)

TRAINING_IMAGES = dict(
    in1k=1281167, cifar10=50000, cifar100=50000, caltech101=6907, flowers102=2040, pets=3680, cars=8144, digits=1437
) | {'fashion': 55000, 'caltech101-64px': 5525, 'cifar10-64px': 45000}
SMALL = {48: 'nano', 32: 'pico'}  # their channels in stage 1
SHORT = ('digits', 'caltech101-64px', 'cifar10-64px')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_is_what_its_name_says(path):
    """Its model builds, an epoch has tens of steps, and none is chosen on test images."""
    config = Config.fromfile(path)
    model = build_model(config)
    check_listed_size(path, model)
    name = path.stem.split('_')
    dataset = next(key for part in name[2:] for key in NUM_CLASSES if part.split('-')[0] == key and key != name[1])
    classes = NUM_CLASSES[dataset]
    assert model.head.num_classes == config.data_preprocessor.num_classes == classes
    assert model.head.in_channels == model.backbone.embed_dims * 8
    arch = config.model.backbone.arch
    assert f'strip-mlp-{arch if isinstance(arch, str) else SMALL[arch.embed_dims]}' == name[0]
    size = {'384px': 384, '128px': 128, '64px': 64, '32px': 32}.get(path.stem.rpartition('-')[2], 224)
    assert model.backbone.img_size == (size, size)
    gpus, batch = map(int, re.search(r'(\d+)xb(\d+)', path.stem).groups())
    assert config.train_dataloader.batch_size == batch
    assert config.auto_scale_lr.base_batch_size == gpus * batch
    if 'in1k-pre' in name:
        pretrained = config.model.backbone.get('init_cfg') or config.model.init_cfg
        assert pretrained.checkpoint == f'checkpoints/{name[0]}_in1k.pth'
    pipelines = [config[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'val', 'test')]
    for transform in itertools.chain(*pipelines, config.tta_pipeline):
        TRANSFORMS.build(transform)
    data = name[-1] if name[-1] in TRAINING_IMAGES else name[-1].split('-')[0]
    steps = TRAINING_IMAGES[data] // config.auto_scale_lr.base_batch_size
    assert steps >= 20 and (data in SHORT or 5000 < steps * config.train_cfg.max_epochs < 400000)
    assert config.default_hooks.checkpoint.save_best == ('auto' if data == 'in1k' else None)


@pytest.mark.parametrize('path', [path for path in COMPARED if 'caltech101' in path.stem], ids=lambda path: path.stem)
def test_compared_models_differ_in_the_model_alone(path):
    config = Config.fromfile(path)
    ours = Config.fromfile(ROOT / 'configs/strip_mlp' / f'strip-mlp-tiny-light_{path.stem.partition("_")[2]}.py')
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    assert all(config[key] == ours[key] for key in (*loaders, 'optim_wrapper', 'param_scheduler', 'train_cfg'))
    assert config.model.head.loss == ours.model.head.loss and config.model.train_cfg == ours.model.train_cfg
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    check_listed_size(path, model)
    images = torch.zeros(2, 3, 64, 64)
    assert model(images).shape == (2, 101)


def test_recipe_is_the_authors():
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-small_8xb128_in1k.py')
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 5e-4, 0.05)
    assert config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.model.backbone.drop_path_rate == 0.1 and not config.model.backbone.get('drop_path_ramp')
    augments = [(augment.type, augment.alpha) for augment in config.model.train_cfg.augments]
    assert augments == [('Mixup', 0.8), ('CutMix', 1.0)]
    assert config.model.head.loss.label_smooth_val == 0.1


def test_no_decay_on_biases_and_flat_parameters_but_on_grn():
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny-light_8xb128_in1k.py')
    model = build_model(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decayed = {names[id(group['params'][0])]: group['weight_decay'] > 0 for group in groups}
    for name, parameter in model.named_parameters():
        # The authors hold GRN's parameters in four dimensions, and decay what has more than one.
        assert decayed[name] == ('.grn.' in name or (parameter.ndim > 1 and not name.endswith('bias'))), name


def test_cifar_images_are_taken_as_rgb():
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_1xb128_cifar10.py')
    assert config.data_preprocessor.to_rgb is False
    *_, augment, erase, _, _ = config.train_dataloader.dataset.pipeline
    assert augment.hparams.pad_val == [124, 116, 104] and erase.fill_color == config.data_preprocessor.mean
    imagenet = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
    erase = imagenet.train_dataloader.dataset.pipeline[-3]
    assert imagenet.data_preprocessor.to_rgb and erase.fill_color == imagenet.data_preprocessor.mean[::-1]


@pytest.mark.parametrize(
    'name',
    ['8xb128_in1k', 'in1k-pre_8xb64_in1k-384px', '1xb128_cifar10', 'in1k-pre_1xb128_cifar100', '1xb128_caltech101'],
)
def test_pipelines_give_images_of_the_models_size(name, tmp_path):
    config = Config.fromfile(ROOT / f'configs/strip_mlp/strip-mlp-tiny_{name}.py')
    init_default_scope(config.default_scope)
    side = config.model.backbone.img_size
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    for pipeline in (config.train_pipeline, config.test_pipeline, config.tta_pipeline):
        packed = Compose(pipeline)(dict(img=image.copy(), img_path=str(tmp_path / 'image.png'), gt_label=3))
        views = packed['inputs'] if isinstance(packed['inputs'], list) else [packed['inputs']]
        assert [tuple(view.shape) for view in views] == [(3, side, side)] * len(views)
        assert len(views) == (2 if pipeline is config.tta_pipeline else 1)
        samples = packed['data_samples']
        assert all(sample.gt_label == 3 for sample in (samples if isinstance(samples, list) else [samples]))


def test_learning_rate_over_the_epochs():
    """Warm-up from 5e-7 to 5e-4 in 20 epochs, cosine to 5e-6 in 300."""
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
    steps = 3  # iterations of an epoch
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    arguments = dict(optimizer=OptimWrapper(optimizer), epoch_length=steps)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(end=config.train_cfg.max_epochs) | scheduler, default_args=arguments)
        for scheduler in config.param_scheduler
    ]
    rates = []
    for _ in range(300 * steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(5e-7)
    assert max(rates) == rates[20 * steps] == pytest.approx(5e-4)
    assert rates[160 * steps] == pytest.approx((5e-4 + 5e-6) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(5e-6, rel=1e-3)
