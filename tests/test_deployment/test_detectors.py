"""Whole detectors in exported files: the boxes and masks that mmdet finds, in plain operators of ONNX."""

import numpy as np
import onnx
import pytest
import torch
from helpers import last_line
from helpers.exports import CLASSES, PAD_VALUE, SIZES
from helpers.runs import call_tool
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from PIL import Image

from mmstrip.deployment import Export, export_model, formats, load, mmdeploy
from mmstrip.deployment.detections import disagreement, values_of
from mmstrip.deployment.preprocessing import normalize
from mmstrip.deployment.quantization import quantize
from mmstrip.deployment.testing import ExportedModel


def pictures_of(height, width, path):
    """Spots, one picture as a path and one of half the size."""
    spots = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = np.array(Image.fromarray(spots).resize((width, height)))
    Image.fromarray(large[::-1, ::-1]).save(path)
    return [str(path), large, np.array(Image.fromarray(spots).resize((width // 2, height // 2)))]


@pytest.mark.parametrize(
    'name, options',
    [('RetinaNet', {}), ('MaskRCNN', dict(form='openvino', normalize=True)), ('CascadeRCNN', {})],
)
def test_detectors_predict_as_in_mmdet(name, options, detector, tmp_path):
    out = detector(name, **options)
    config, checkpoint = (str(out.with_name(file)) for file in ('config.py', 'weights.pth'))
    height, width = SIZES[name]
    if out.suffix == '.onnx':
        nodes = onnx.load(out).graph.node
        assert {node.domain for node in nodes} == {''} and 'NonMaxSuppression' in {node.op_type for node in nodes}
    pictures = pictures_of(height, width, tmp_path / 'picture.png')
    predictor = load(out)
    assert predictor.about['shape'] == [height, width] and predictor.about['classes'] == CLASSES
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    for picture, found in zip(pictures, predictor(pictures), strict=True):
        (expected,) = inferencer(picture, return_datasamples=True)['predictions']
        expected = values_of(expected.pred_instances)
        assert set(found) == set(expected) and len(found['scores']) >= 10
        assert disagreement(found, expected, width) < 1e-4
        if 'masks' in expected:
            assert found['masks'].shape[1:] == expected['masks'].shape[1:] and found['masks'].any()
    with pytest.raises(
        ValueError, match=f'of up to {height} x {width}, but got 64 x 97; export it with another --shape$'
    ):
        predictor.run(np.zeros((1, 3, 64, 97), np.uint8))
    truth = InstanceData(bboxes=HorizontalBoxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]])), labels=torch.tensor([1]))
    sample = DetDataSample(metainfo=dict(ori_shape=(height, width)), gt_instances=truth)
    image = torch.from_numpy(pictures[1].transpose(2, 0, 1).copy())
    (tested,) = ExportedModel(str(out)).test_step(dict(inputs=[image], data_samples=[sample]))
    visualizer = DetLocalVisualizer(vis_backends=[dict(type='LocalVisBackend')], save_dir=str(tmp_path / 'drawn'))
    visualizer.add_datasample('truth', image.permute(1, 2, 0).numpy(), tested)
    assert list((tmp_path / 'drawn').rglob('*.png'))
    boxes = predictor.run(np.zeros((1, 3, 40, 50), np.uint8))[0]  # padded
    assert boxes.shape[0] == 1 and boxes.shape[2] == 5
    padding = predictor.inputs(np.zeros((1, 3, 40, 50), np.uint8))[:, :, -1:, -1:]
    if predictor.about['normalize']:
        padding = normalize(padding, *(predictor.about[name] for name in ('mean', 'std', 'flip')))
    np.testing.assert_allclose(padding, PAD_VALUE, atol=0.01)
    with pytest.raises(ValueError, match=f'backbones and necks can be quantized, but {out} is a detector'):
        quantize(out, tmp_path / f'int8{out.suffix}', [])


def test_other_detections_are_noticed():
    boxes = np.float32([[0, 0, 8, 8], [8, 8, 16, 16], [2, 2, 10, 10], [4, 0, 16, 8]])
    masks = np.random.default_rng(0).random((4, 16, 16)) > 0.5
    found = dict(bboxes=boxes, scores=np.float32([0.9, 0.8, 0.5, 0.3]), labels=np.array([0, 1, 1, 0]), masks=masks)
    order = [2, 0, 3, 1]
    assert disagreement(found, {name: values[order] for name, values in found.items()}, 16) == 0
    moved, lower = boxes + np.float32([[0.16, 0, 0, 0]] + [[0] * 4] * 3), found['scores'] - np.float32([0, 0, 0, 0.02])
    assert disagreement(found, dict(found, bboxes=moved), 16) == pytest.approx(0.01, abs=1e-6)
    assert disagreement(found, dict(found, scores=lower), 16) == pytest.approx(0.02, abs=1e-6)
    assert disagreement(found, dict(found, labels=np.array([0, 1, 1, 2])), 16) > 0.1
    assert disagreement(found, dict(found, masks=masks[order]), 16) >= 1
    for fewer in (1, 3):
        some = {name: values[:fewer] for name, values in found.items()}
        assert disagreement(found, some, 16) > 0.1 and disagreement(some, found, 16) > 0.1
    none = {name: values[:0] for name, values in found.items()}
    assert disagreement(none, found, 16) == np.inf and disagreement(none, none, 16) is None


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(format='torch-export'), "format must be onnx or openvino for whole detectors, but got 'torch-export'"),
        (dict(opset=13), '--opset must be at least 16 for detectors, but got 13'),
        (dict(dynamic_batch=True), 'whole detectors are exported for one image of one size: leave out --dynamic-batch'),
    ],
)
def test_what_detectors_cannot_is_named(settings, words, detector, tmp_path):
    folder, settings = detector('RetinaNet').parent, Export(**settings)
    out = tmp_path / f'out{formats.SUFFIXES[settings.format]}'
    with pytest.raises(ValueError, match=words):
        export_model(str(folder / 'config.py'), str(folder / 'weights.pth'), out, settings)
    assert not list(tmp_path.iterdir())


def test_what_mmdeploy_cannot_trace_is_said(detector, tmp_path):
    folder = detector('RetinaNet').parent
    options = {'model.test_cfg.nms.type': 'soft_nms'}
    with pytest.raises(ValueError, match=r'RetinaNet cannot be traced by mmdeploy \(ValueError: only per-class nms'):
        export_model(str(folder / 'config.py'), str(folder / 'weights.pth'), tmp_path / 'out.onnx', Export(), options)
    assert not list(tmp_path.iterdir())


def test_another_mmdeploy_is_refused(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(mmdeploy, 'version', lambda name: '1.4.0')
    with pytest.raises(ValueError, match='need mmdeploy 1.3.1, but 1.4.0 is installed: run pip install --no-deps'):
        export_model(str(detector('RetinaNet').with_name('config.py')), 'weights.pth', tmp_path / 'out.onnx', Export())


def test_nothing_but_an_export_imports_mmdeploy(tmp_path):
    """Predicting does not either, nor does it need a toolbox: a script in a fresh process would pay for its imports."""
    script = tmp_path / 'script.py'
    script.write_text('import sys, mmstrip.deployment, mmstrip.deployment.export\nprint("mmdeploy" in sys.modules)\n')
    done = call_tool(script, folder=tmp_path)
    assert last_line(done.stdout) == 'False', done.stdout
