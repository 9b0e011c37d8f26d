"""Exported files: their values in each runtime, and predictions like the inferencers'."""

import dataclasses
import logging
import sys
from contextlib import suppress

import numpy as np
import onnx
import pytest
import torch
from helpers import SMALL_ARCH, last_line, randomise
from helpers.exports import CLASSES, EXPORTS, SCENES, SMALL_SCENES, Stems, build_model
from helpers.runs import CONFIG, call_tool
from mmcv.transforms import RandomFlip
from mmengine.registry import MODELS, init_default_scope

from mmstrip.deployment import Export, any_size, export_model, load
from mmstrip.deployment.export import channels_of, check
from mmstrip.deployment.formats import SUFFIXES, to_onnx, trace, without_warnings, written_atomically
from mmstrip.deployment.runtimes import RUNTIMES
from mmstrip.deployment.testing import ExportedModel
from mmstrip.models.windows import _run_in_any_windows, run_in_windows
from mmstrip.utils.config import load_config

REGRESSION = dict(_delete_=True, type='LinearRegressionHead', num_classes=1, in_channels=128)
FLIPPED = dict(type='mmstrip.Digits', pipeline=[dict(type=RandomFlip, prob=1.0)])


@pytest.mark.parametrize('name', ['classifier', 'classifier in openvino'])
def test_classifiers_predict_as_in_mmpretrain(name, exported, pictures):
    from mmpretrain import ImageClassificationInferencer

    file = exported(name)
    config = load_config(str(CONFIG))
    inferencer = ImageClassificationInferencer(config, pretrained=str(file.with_name('weights.pth')), device='cpu')
    expected, predictor = inferencer([str(pictures[0]), *pictures[1:]]), load(file)
    for result, other in zip(predictor(pictures, batch_size=2), expected, strict=True):
        np.testing.assert_allclose(result['pred_scores'], other['pred_scores'], atol=1e-4)
        assert result['pred_score'] == result['pred_scores'].max() and set(result) == set(other)
        assert result['pred_label'] == other['pred_label'] and result['pred_class'] == CLASSES[result['pred_label']]
    with pytest.raises(ValueError, match='takes images of 32 x 32, but got 64 x 32; export it with another --shape or'):
        predictor.run(np.zeros((1, 3, 64, 32), np.uint8))


def test_segmentors_predict_as_in_mmseg(exported, pictures):
    """And are tested at the sizes of their pictures."""
    from mmseg.apis import MMSegInferencer
    from mmseg.structures import SegDataSample

    file, (config, options, *_) = exported('segmentor'), EXPORTS['segmentor']
    weights = str(file.with_name('weights.pth'))
    inferencer = MMSegInferencer(load_config(config, options), weights, device='cpu', show_progress=False)
    listed = [str(pictures[0]), pictures[1], np.ascontiguousarray(pictures[1][:, :70])]
    found, expected = load(file)(listed, batch_size=2), inferencer(listed)['predictions']
    for one, other, size in zip(found, expected, ((70, 100), (70, 100), (70, 70)), strict=True):
        assert one.shape == other.shape == size and one.dtype == other.dtype
        assert (one == other).mean() > 0.999  # where two classes are all but equal
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 80, 112), dtype=np.uint8))
    sizes = [(80, 112), (100, 150)]
    samples = [SegDataSample(metainfo=dict(ori_shape=size)) for size in sizes]
    tested = ExportedModel(str(file)).test_step(dict(inputs=[image, image], data_samples=samples))
    (same,) = load(file)(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    np.testing.assert_array_equal(tested[0].pred_sem_seg.data[0].numpy(), same)
    assert [sample.pred_sem_seg.shape for sample in tested] == sizes


class Headed(torch.nn.Module):
    """A segmentor's head, which pools, behind one convolution for each of its maps."""

    def __init__(self):
        super().__init__()
        init_default_scope('mmseg')
        options = dict(in_channels=[8] * 2, in_index=[0, 2], channels=4, num_classes=3, norm_cfg=dict(type='BN'))
        self.head = MODELS.build(dict(type='mmseg.UPerHead', **options))
        self.stems = Stems()

    def forward(self, images):
        return (self.head(self.stems(images)),)


def test_heads_of_segmentors_at_any_size():
    """Whole ones, with the head of FPN, are exported for test_tables.py."""
    model = randomise(Headed().eval().requires_grad_(False))
    any_size.prepare(model)
    traced = to_onnx(trace(model, torch.randn(2, 3, 96, 128), dynamic_batch=True, dynamic_size=True))
    for start in RUNTIMES.values():
        run = start(traced.SerializeToString(), 'float32')
        for shape in ((2, 3, 96, 128), (1, 3, 64, 224), (3, 3, 160, 96)):
            images = torch.randn(shape)
            (expected,) = model(images)
            torch.testing.assert_close(torch.from_numpy(run(images.numpy())[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('extent', [(4, 5), (9, 17), (20, 20), (4, 17), (1, 3)])
def test_windows_without_branches_are_the_same(extent):
    x = torch.rand(2, 3, 9, 17)
    torch.testing.assert_close(
        _run_in_any_windows(torch.sin, x, extent), run_in_windows(torch.sin, x, extent), rtol=0, atol=1e-6
    )


def test_necks_of_detectors(exported, tmp_path):
    file, (config, options, *_) = exported('neck'), EXPORTS['neck']
    model = build_model(load_config(config, options))
    model.load_state_dict(torch.load(file.with_name('weights.pth'))['state_dict'])
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        images = model.data_preprocessor(dict(inputs=list(pixels), data_samples=None))['inputs']
        expected = model.neck(model.backbone(images[..., :64, :96]))
    for found, output in zip(load(file).run(pixels.numpy()), expected, strict=True):
        assert np.abs(found - output.numpy()).max() < 1e-5 * output.abs().max()


def test_the_command(checkpoint, tmp_path):
    """Takes one side for both, and says how far outputs are from PyTorch's."""
    arguments = [
        CONFIG,
        checkpoint,
        tmp_path / 'maps.onnx',
        '--features',
        '--shape',
        '32',
        '--normalize',
        '--opset',
        '18',
    ]
    done = call_tool('deployment/export.py', *arguments, folder=tmp_path)
    assert done.returncode == 0 and 'Largest difference from PyTorch: ' in last_line(done.stdout), done.stdout
    about = load(tmp_path / 'maps.onnx').about
    assert {item.version for item in onnx.load(tmp_path / 'maps.onnx').opset_import} == {18}
    assert about['shape'] == [32, 32] and about['normalize'] and about['outputs'] == ['map0']
    done = call_tool('deployment/export.py', CONFIG, checkpoint, tmp_path / 'out.pth', folder=tmp_path)
    words = f'Error: a file in onnx format must end in .onnx, but got {tmp_path}/out.pth'
    assert last_line(done.stdout) == words, done.stdout


@pytest.mark.parametrize(
    'settings, options, words',
    [
        (dict(format='torch-export', opset=20), {}, '--opset is for onnx and openvino, but the format is torch-export'),
        (dict(opset=12), {}, 'opset must be one that PyTorch supports for this model, such as 18, but got 12'),
        (dict(part='backbone', scores=True), {}, '--scores is for classifiers, but .*py exports a backbone'),
        (dict(part='neck'), {'model.neck': None}, 'ImageClassifier has no neck to export'),
        (dict(part='neck'), {}, r'only maps \(N, C, H, W\) can be exported, but the neck gives \[\(1, 128\)\]'),
        (dict(shape=(16, 64)), {}, 'sides of --shape must be at least 32 pixels, but got 16 64'),
        (dict(shape=(32, 64), dynamic_size=True), {}, 'sides of --shape must be from 64 to 8192 pixels, but got 32 64'),
        ({}, {'model': None}, 'py has no model$'),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='RandomFlip', prob=1.0)]},
            'only test pipelines of Resize, ResizeEdge, CenterCrop can be exported, but this one has RandomFlip',
        ),
        (
            {},
            {'test_dataloader.dataset': dict(_delete_=True, type='ConcatDataset', datasets=[FLIPPED])},
            'only test pipelines of Resize, ResizeEdge, CenterCrop can be exported, but this one has RandomFlip',
        ),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile', color_type='grayscale')]},
            "color_type of LoadImageFromFile in the test pipeline must be 'color' for an export, but is 'grayscale'",
        ),
        (
            {},
            {'test_dataloader.dataset.pipeline': [dict(type='LoadMultiChannelImageFromFiles')]},
            'can be exported, but this one has LoadMultiChannelImageFromFiles',
        ),
        (
            dict(shape=(48, 48)),
            {'test_dataloader.dataset.pipeline': [dict(type='CenterCrop', crop_size=(48, 32))]},
            '--shape must be 32 48, the size of images after the test pipeline, but got 48 48',
        ),
        ({}, {'model.head': REGRESSION}, 'only single-label classifiers .* but the head is LinearRegressionHead'),
        ({}, {'data_preprocessor.pad_size_divisor': 32}, 'pad_size_divisor must be 1 for an export, but is 32'),
    ],
)
def test_what_cannot_be_exported_is_named(settings, options, words, checkpoint, tmp_path):
    settings = dataclasses.replace(Export(), **settings)
    out = tmp_path / f'out{SUFFIXES[settings.format]}'
    with pytest.raises(ValueError, match=words):
        export_model(str(CONFIG), checkpoint, out, settings, options)
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
    files = [tmp_path / name for name in ('model.bin', 'model.xml')]
    for content in ('old', 'new'):
        with written_atomically(files[1]) as made:
            assert [file.read_text() for file in tmp_path.glob('model.*')] in ([], ['old', 'old'])
            for file in files:
                (made.parent / file.name).write_text(content)
        with suppress(KeyboardInterrupt), written_atomically(files[1]) as made:
            made.write_text('half')
            raise KeyboardInterrupt
        assert [file.read_text() for file in files] == [content] * 2
        assert sorted(tmp_path.iterdir()) == files


def test_what_a_caller_does_not_log_is_not_logged_afterwards():
    logging.disable(logging.CRITICAL)
    try:
        with without_warnings():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_slide_is_refused(tmp_path):
    options = {**SMALL_SCENES, 'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}
    with pytest.raises(ValueError, match='only segmentors with .* but the mode is .slide.; pass --cfg-options'):
        export_model(SCENES, 'weights.pth', tmp_path / 'out.onnx', Export(), options)


def test_files_that_were_not_exported_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no exported file at .*none.onnx'):
        load(tmp_path / 'none.onnx')
    with pytest.raises(ValueError, match='an exported file ends in .onnx, .pt2, .xml, but got .*model.pth'):
        load(tmp_path / 'model.pth')
    for suffix in SUFFIXES.values():
        (tmp_path / f'bad{suffix}').write_bytes(b'nothing')
        (tmp_path / 'bad.bin').write_bytes(b'nothing')
        with pytest.raises(ValueError, match='is damaged or not an exported file'):
            load(tmp_path / f'bad{suffix}', trusted=True)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match='bad.xml needs openvino, which is not installed: pip install openvino'):
        load(tmp_path / 'bad.xml')
