"""Whole detectors in exported files: the boxes and masks that mmdet finds, in plain operators of ONNX."""

import numpy as np
import onnx
import pytest
import torch
from helpers import last_line
from helpers.exports import CLASSES, DETECTORS, PAD_VALUE, SIZES, write_detector
from helpers.runs import call_tool
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from PIL import Image

from mmstrip.deployment import Export, export_model, formats, load, mmdeploy
from mmstrip.deployment.detections import disagreement, values_of
from mmstrip.deployment.preprocessing import normalise
from mmstrip.deployment.quantization import quantise
from mmstrip.deployment.testing import ExportedModel


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request, tmp_path_factory):
    return request.param, *write_detector(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory):
    return write_detector('RetinaNet', tmp_path_factory.mktemp('refused'))


def pictures_of(height, width, path):
    """Spots, one picture as a path and one of half the size."""
    spots = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = np.array(Image.fromarray(spots).resize((width, height)))
    Image.fromarray(large[::-1, ::-1]).save(path)
    return [str(path), large, np.array(Image.fromarray(spots).resize((width // 2, height // 2)))]


FORMS = {
    'RetinaNet': ('onnx', dict(half=False)),
    'MaskRCNN': ('openvino', dict(normalize=True)),
    'CascadeRCNN': ('onnx', dict()),
}


def test_detectors_predict_as_in_mmdet(detector, tmp_path):
    name, config, checkpoint = detector
    form, options = FORMS[name]
    height, width = SIZES[name]
    out = tmp_path / f'small{formats.SUFFIXES[form]}'
    assert export_model(config, checkpoint, out, Export(form, **options)) < 1e-5
    if form == 'onnx':
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
    with pytest.raises(ValueError, match=f'of up to {height} x {width}, but got 64 x 97; export it with --shape 97 97'):
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
        padding = normalise(padding, *(predictor.about[name] for name in ('mean', 'std', 'flip')))
    np.testing.assert_allclose(padding, PAD_VALUE, atol=0.01)
    with pytest.raises(ValueError, match=f'backbones and necks are quantised, but {out} holds a detector'):
        quantise(out, tmp_path / f'int8{formats.SUFFIXES[form]}', [])


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(format='torch-export'), 'whole detectors are exported to onnx and openvino, but the format is torch-exp'),
        (dict(dynamic_batch=True), 'whole detectors take one image of one size: leave out --dynamic-batch'),
        (dict(opset=99), r'RetinaNet cannot be traced by mmdeploy \(.*99\): export its --features or --neck'),
        (dict(opset=13), '--opset must be at least 16 for detectors, but got 13'),
    ],
)
def test_what_detectors_cannot_is_named(settings, words, retinanet, tmp_path):
    settings = Export(**settings)
    out = tmp_path / f'out{formats.SUFFIXES[settings.format]}'
    with pytest.raises(ValueError, match=words):
        export_model(*retinanet, out, settings)
    assert not list(tmp_path.iterdir())


def test_other_suppression_is_refused():
    from mmstrip.deployment.mmdeploy.rewriters import choose

    settings = dict(nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=3)
    with pytest.raises(ValueError, match="nms of the type 'nms' among boxes of one class is exported, but got"):
        choose(torch.rand(1, 2, 4), torch.rand(1, 1, 2), settings)


def test_another_mmdeploy_is_refused(retinanet, tmp_path, monkeypatch):
    monkeypatch.setattr(mmdeploy, 'version', lambda name: '1.4.0')
    with pytest.raises(ValueError, match='need mmdeploy 1.3.1, but 1.4.0 is installed here: pip install --no-deps'):
        export_model(*retinanet, tmp_path / 'out.onnx', Export())


def test_nothing_but_an_export_imports_mmdeploy(tmp_path):
    """Predicting does not either, nor does it need a toolbox: a script in a fresh process would pay for its imports."""
    script = tmp_path / 'script.py'
    script.write_text('import sys, mmstrip.deployment, mmstrip.deployment.export\nprint("mmdeploy" in sys.modules)\n')
    done = call_tool(script, folder=tmp_path)
    assert last_line(done.stdout) == 'False', done.stdout
