"""Exported files: their values in each runtime, what they say of themselves, and predictions like the inferencers'."""

import dataclasses
import logging
import sys

import numpy as np
import onnx
import pytest
import torch
from helpers import SMALL_ARCH, last_line, randomise
from helpers.exports import CLASSES, DETECTORS, SCENES, SMALL_SCENES, build_model, write_checkpoint
from helpers.runs import CONFIG, call_tool
from mmcv.transforms import RandomFlip
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmstrip.deployment import Export, Predictor, any_size, export_model, load
from mmstrip.deployment.export import channels_of, check
from mmstrip.deployment.formats import SUFFIXES, publish, quietly, to_onnx, trace
from mmstrip.deployment.runtimes import RUNTIMES
from mmstrip.deployment.testing import ExportedModel
from mmstrip.models.windows import _run_in_any_windows, run_in_windows
from mmstrip.utils.config import load_config

SIZE = (70, 100)  # of the pictures
REGRESSION = dict(_delete_=True, type='LinearRegressionHead', num_classes=1, in_channels=128)
FLIPPED = dict(type='mmstrip.Digits', pipeline=[dict(type=RandomFlip, prob=1.0)])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A picture's path, and arrays as OpenCV has them."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (SIZE, SIZE, (64, 32))]
    path = tmp_path_factory.mktemp('pictures') / 'picture.png'
    Image.fromarray(arrays[0][..., ::-1]).save(path)
    return [path, *arrays[1:]]


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, pictures):
    """A checkpoint, and what mmpretrain predicts with it."""
    from mmpretrain import ImageClassificationInferencer

    config = load_config(str(CONFIG))
    path = write_checkpoint(config, tmp_path_factory.mktemp('classifier') / 'weights.pth', CLASSES)
    inferencer = ImageClassificationInferencer(config, pretrained=path, device='cpu')
    return path, inferencer([str(pictures[0]), *pictures[1:]])


@pytest.mark.parametrize(
    'form, options',
    [
        ('onnx', dict(half=True, normalize=True, scores=True, opset=20)),
        ('torch-export', dict(dynamic_batch=True, normalize=True, deploy=False)),
        ('openvino', dict(dynamic_batch=True, scores=True)),
    ],
)
def test_classifiers_predict_as_in_mmpretrain(form, options, classifier, pictures, tmp_path):
    checkpoint, expected = classifier
    out = tmp_path / f'small{SUFFIXES[form]}'
    assert export_model(str(CONFIG), checkpoint, out, Export(form, **options)) < (2e-2 if 'half' in options else 1e-5)
    predictor = load(out, trusted=form == 'torch-export')
    tolerance = 5e-2 if 'half' in options else 1e-4
    for result, other in zip(predictor(pictures, batch_size=2), expected, strict=True):
        np.testing.assert_allclose(result['pred_scores'], other['pred_scores'], atol=tolerance)
        assert result['pred_score'] == result['pred_scores'].max()
        assert result['pred_class'] == CLASSES[result['pred_label']]
        if 'half' not in options:
            assert result['pred_label'] == other['pred_label'] and set(result) == set(other)
    weights = sum(p.numel() for p in build_model(load_config(str(CONFIG))).parameters()) * 4
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    if form == 'onnx':
        assert size < 0.65 * weights
        assert '"digit 9"' in next(item.value for item in onnx.load(out).metadata_props if item.key == 'mmstrip')
    if options.get('normalize'):
        assert predictor.session(np.zeros((1, 3, 32, 32), np.uint8))[0].shape == (1, 10)
    with pytest.raises(ValueError, match='takes images of 32 x 32, but got 64 x 32; export it with --dynamic-size or'):
        predictor.run(np.zeros((1, 3, 64, 32), np.uint8))
    if 'dynamic_batch' not in options:
        with pytest.raises(ValueError, match='takes one image at a time, but got 2'):
            predictor.run(np.zeros((2, 3, 32, 32), np.uint8))


def test_segmentors_predict_as_in_mmseg(pictures, tmp_path):
    """And are tested at the sizes of their pictures."""
    from mmseg.apis import MMSegInferencer
    from mmseg.structures import SegDataSample

    config = load_config(SCENES, SMALL_SCENES)
    config.test_dataloader.dataset.pipeline[0:1] = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(112, 80), keep_ratio=False),
    ]
    config.dump(tmp_path / 'config.py')
    checkpoint = write_checkpoint(config, tmp_path / 'weights.pth', [str(i) for i in range(11)])
    settings = Export(dynamic_batch=True, shape=(80, 112))
    assert export_model(str(tmp_path / 'config.py'), checkpoint, tmp_path / 'small.onnx', settings) < 1e-5
    inferencer = MMSegInferencer(str(tmp_path / 'config.py'), checkpoint, device='cpu', show_progress=False)
    listed = [str(pictures[0]), pictures[1], np.ascontiguousarray(pictures[1][:, :70])]
    found, expected = load(tmp_path / 'small.onnx')(listed, batch_size=2), inferencer(listed)['predictions']
    for one, other, size in zip(found, expected, (SIZE, SIZE, (70, 70)), strict=True):
        assert one.shape == other.shape == size and one.dtype == other.dtype
        assert (one == other).mean() > 0.999  # where two classes are all but equal
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 80, 112), dtype=np.uint8))
    sizes = [(80, 112), (100, 150)]
    samples = [SegDataSample(metainfo=dict(ori_shape=size)) for size in sizes]
    tested = ExportedModel(str(tmp_path / 'small.onnx')).test_step(dict(inputs=[image, image], data_samples=samples))
    (same,) = load(tmp_path / 'small.onnx')(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    np.testing.assert_array_equal(tested[0].pred_sem_seg.data[0].numpy(), same)
    assert [sample.pred_sem_seg.shape for sample in tested] == sizes


class Headed(torch.nn.Module):
    """A segmentor's head, which pools, behind one convolution for each of its maps."""

    def __init__(self):
        super().__init__()
        init_default_scope('mmseg')
        options = dict(in_channels=[4] * 2, in_index=[0, 1], channels=4, num_classes=3, norm_cfg=dict(type='BN'))
        self.head = MODELS.build(dict(type='mmseg.UPerHead', **options))
        self.stems = torch.nn.ModuleList(torch.nn.Conv2d(3, 4, stride, stride) for stride in (4, 16))

    def forward(self, images):
        return (self.head([stem(images) for stem in self.stems]),)


def test_heads_of_segmentors_at_any_size():
    """Whole segmentors are tested in test_tables.py, with the head of FPN."""
    model = randomise(Headed().eval().requires_grad_(False))
    any_size.prepare(model)
    traced = to_onnx(trace(model, torch.randn(2, 3, 96, 128), dynamic_batch=True, dynamic_size=True))
    for start in RUNTIMES.values():
        run = start(traced.SerializeToString(), 'float32')
        for shape in ((2, 3, 96, 128), (1, 3, 64, 224), (3, 3, 160, 96)):
            images = torch.randn(shape)
            (expected,) = model(images)
            torch.testing.assert_close(torch.from_numpy(run(images.numpy())[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [(7, 9), (3, 5), (12, 6)])
def test_pooling_as_a_product_is_the_same(size):
    x = torch.rand(2, 3, *size)
    for count in (1, 2, 3, 6):
        layer = torch.nn.AdaptiveAvgPool2d(count)
        torch.testing.assert_close(any_size._pool(layer, x), layer(x))


@pytest.mark.parametrize('extent', [(4, 5), (9, 17), (20, 20), (4, 17), (1, 3)])
def test_windows_without_branches_are_the_same(extent):
    x = torch.rand(2, 3, 9, 17)
    torch.testing.assert_close(
        _run_in_any_windows(torch.sin, x, extent), run_in_windows(torch.sin, x, extent), rtol=0, atol=1e-6
    )


def test_necks_of_detectors(tmp_path):
    detector = DETECTORS['RetinaNet']
    config = load_config(detector)
    checkpoint = write_checkpoint(config, tmp_path / 'weights.pth')
    arguments = ['--neck', '--shape', '64', '96']
    out = tmp_path / 'neck.onnx'
    done = call_tool('deployment/export.py', detector, checkpoint, out, *arguments, folder=tmp_path)
    assert done.returncode == 0 and 'outputs differ from those of PyTorch by' in last_line(done.stdout), done.stdout
    model = build_model(config)
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        images = model.data_preprocessor(dict(inputs=list(pixels), data_samples=None))['inputs']
        expected = model.neck(model.backbone(images[..., :64, :96]))
    for found, output in zip(Predictor(out).run(pixels.numpy()), expected, strict=True):
        assert np.abs(found - output.numpy()).max() < 1e-5 * output.abs().max()
    done = call_tool('deployment/export.py', detector, checkpoint, tmp_path / 'out.pth', folder=tmp_path)
    assert last_line(done.stdout) == f'Error: files of onnx end in .onnx, but got {tmp_path}/out.pth', done.stdout


@pytest.mark.parametrize(
    'settings, options, words',
    [
        (dict(format='torch-export', opset=20), {}, '--opset is for onnx and openvino, but the format is torch-export'),
        (dict(part='backbone', scores=True), {}, '--scores are of classifiers, but of .*py a backbone is exported'),
        (dict(part='neck'), {'model.neck': None}, 'ImageClassifier has no neck to be exported'),
        (dict(shape=(16, 64)), {}, 'sides of --shape must be at least 32 pixels, but got 16 64'),
        (dict(shape=(32, 64), dynamic_size=True), {}, 'sides of --shape must be from 64 to 8192 pixels, but got 32 64'),
        (dict(opset=12), {}, 'opset must be one in which PyTorch can write the model, but got 12: it wrote 18'),
        ({}, {'model': None}, 'py has no model to be exported'),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='RandomFlip', prob=1.0)]},
            'may have Resize, ResizeEdge, CenterCrop to be exported, but it has RandomFlip',
        ),
        (
            {},
            {'test_dataloader.dataset': dict(_delete_=True, type='ConcatDataset', datasets=[FLIPPED])},
            'may have Resize, ResizeEdge, CenterCrop to be exported, but it has RandomFlip',
        ),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile', color_type='grayscale')]},
            "LoadImageFromFile's color_type must be 'color' in the test pipeline to be exported, but got 'grayscale'",
        ),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='LoadMultiChannelImageFromFiles')]},
            'to be exported, but it has LoadMultiChannelImageFromFiles',
        ),
        (
            dict(shape=(48, 48)),
            {'test_dataloader.dataset.pipeline': [dict(type='CenterCrop', crop_size=(48, 32))]},
            '--shape must be 32 48, the size that the test pipeline gives all pictures, but got 48 48',
        ),
        ({}, {'model.head': REGRESSION}, 'of one label are exported, but the head is LinearRegressionHead'),
        ({}, {'data_preprocessor.pad_size_divisor': 32}, 'pad_size_divisor must be 1 to be exported'),
    ],
)
def test_what_cannot_be_exported_is_named(settings, options, words, classifier, tmp_path):
    settings = dataclasses.replace(Export(), **settings)
    out = tmp_path / f'out{SUFFIXES[settings.format]}'
    with pytest.raises(ValueError, match=words):
        export_model(str(CONFIG), classifier[0], out, settings, options)
    assert not list(tmp_path.iterdir())


def test_not_a_number_is_a_difference():
    outputs = torch.ones(1, 2), torch.full((1, 2), torch.nan)
    about = dict(task='backbone', shape=(32, 32), channels=3, normalize=False, dynamic_batch=False, dynamic_size=False)
    error = check(lambda images: outputs, lambda images: [output.numpy() for output in outputs], about)
    assert not error < 1


def test_channels_are_those_of_images():
    """MobileNetV2's ``in_channels`` are of its last block."""
    backbone = dict(type='MobileNetV2', widen_factor=0.1)
    init_default_scope('mmpretrain')
    for mean, channels in ((None, 3), ([0.5], 1)):
        before = dict(mean=mean, std=mean)
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, data_preprocessor=before))
        assert channels_of(model) == channels
    backbone = dict(type='mmstrip.StripMLP', arch=SMALL_ARCH, in_channels=2)
    assert channels_of(MODELS.build(dict(type='ImageClassifier', backbone=backbone))) == 2


def test_old_files_are_there_until_new_ones_are(tmp_path):
    """Of two files that belong together."""
    for name in ('old.bin', 'old.xml', 'new.bin'):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileNotFoundError, match='cannot write .*old.xml'):
        publish(tmp_path / 'new.xml', tmp_path / 'old.xml')
    assert (tmp_path / 'old.bin').read_text() == 'old.bin'
    (tmp_path / 'new.xml').write_text('new.xml')
    publish(tmp_path / 'new.xml', tmp_path / 'old.xml')
    assert [(tmp_path / f'old.{kind}').read_text() for kind in ('bin', 'xml')] == ['new.bin', 'new.xml']


def test_what_a_caller_does_not_log_is_not_logged_afterwards():
    logging.disable(logging.CRITICAL)
    try:
        with quietly():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_slide_is_refused(tmp_path):
    config = load_config(SCENES, SMALL_SCENES)
    checkpoint = write_checkpoint(config, tmp_path / 'weights.pth')
    options = {**SMALL_SCENES, 'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}
    with pytest.raises(ValueError, match='exported whole, but model.test_cfg.mode is .slide.'):
        export_model(SCENES, checkpoint, tmp_path / 'out.onnx', Export(), options)


def test_files_that_were_not_exported_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no exported file at .*none.onnx'):
        load(tmp_path / 'none.onnx')
    with pytest.raises(ValueError, match='exported files end in .onnx, .pt2, .xml, but got .*model.pth'):
        load(tmp_path / 'model.pth')
    for suffix in SUFFIXES.values():
        (tmp_path / f'bad{suffix}').write_bytes(b'nothing')
        (tmp_path / 'bad.bin').write_bytes(b'nothing')
        with pytest.raises(ValueError, match='is damaged or another kind of file'):
            load(tmp_path / f'bad{suffix}', trusted=True)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match='bad.xml needs what is not installed here: pip install openvino'):
        load(tmp_path / 'bad.xml')
