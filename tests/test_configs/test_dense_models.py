"""The backbone in detectors and segmentors: each kind trains a step and predicts; zoo configs take it by name."""

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, small_backbone
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

DETECTORS = (
    'retinanet_strip-mlp-tiny-light_fpn_1x_coco',
    'faster-rcnn_strip-mlp-tiny-light_fpn_1x_coco',
    'mask-rcnn_strip-mlp-tiny-light_fpn_1x_coco',
    'cascade-mask-rcnn_strip-mlp-tiny-light_fpn_ms-crop-3x_coco',
    'atss_strip-mlp-tiny-light_fpn_1x_coco',
    'dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco',
)
SEGMENTORS = (
    'strip-mlp-tiny-light_upernet_8xb2-160k_ade20k-512x512',
    'strip-mlp-tiny-light_fpn_8xb2-80k_ade20k-512x512',
    'strip-mlp-tiny-light_segformer_8xb2-160k_ade20k-512x512',
    'strip-mlp-tiny-light_upernet_8xb2-80k_cityscapes-512x1024',
)
SIZE = (96, 128)


def load(task, name):
    config = Config.fromfile(ROOT / 'configs' / task / f'{name}.py')
    init_default_scope(config.default_scope)
    return config


def build(config):
    """A model with the weights that a run without a checkpoint starts from; some are undefined until then."""
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    model.init_weights()
    return model


def step_and_predict(model, samples):
    """A training step, in which all of the backbone gets a gradient, then predictions."""
    model.train()
    losses = model(**model.data_preprocessor(with_images(samples), training=True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    assert torch.isfinite(loss) and all(p.grad is not None for p in backbone)
    return predict(model.eval(), samples)


def predict(model, samples):
    with torch.no_grad():
        return model(**model.data_preprocessor(with_images(samples), training=False), mode='predict')


def with_images(samples):
    images = [torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def detection_sample():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, 8:60, 10:50] = masks[1, 40:90, 60:120] = 1
    boxes = torch.tensor([[10.0, 8, 50, 60], [60, 40, 120, 90]])
    truth = InstanceData(bboxes=boxes, labels=torch.tensor([1, 7]), masks=BitmapMasks(masks.numpy(), *SIZE))
    meta = dict(img_shape=SIZE, ori_shape=SIZE, scale_factor=(1.0, 1.0), img_id=0)
    return DetDataSample(gt_instances=truth, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)), metainfo=meta)


def test_features_serve_compiled_operators():
    """mmcv's RoIAlign takes memory for NCHW: on maps that lie otherwise it gives other values, without an error."""
    from mmcv.ops import roi_align

    rois = torch.tensor([[0, 2.0, 1, 9, 11]])
    for feature in small_backbone(out_indices=(0, 1, 2, 3)).eval()(torch.rand(2, 3, 64, 96)):
        assert feature.is_contiguous()
        copy = torch.tensor(feature.tolist())
        torch.testing.assert_close(roi_align(feature, rois, 3), roi_align(copy, rois, 3))


def smaller(model):
    """One block a stage, narrow heads, and as many proposals or queries as small images ask for."""
    model.backbone.arch = dict(embed_dims=80, depths=(1, 1, 1, 1))
    if 'rpn_head' in model:
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 50
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 64
    if 'num_queries' in model:
        model.num_queries = model.test_cfg.max_per_img = 50
        model.encoder.num_layers = model.decoder.num_layers = 2
    if model.get('decode_head', {}).get('type') == 'UPerHead':
        model.decode_head.channels = 64
    return model


@pytest.mark.parametrize('name', DETECTORS)
def test_detector_trains_and_predicts(name):
    model = build(smaller(load('detection', name).model))
    for sample in step_and_predict(model, [detection_sample(), detection_sample()]):
        boxes = sample.pred_instances.bboxes
        assert boxes.shape[1] == 4 and torch.isfinite(boxes).all()
        if 'mask-rcnn' in name:
            assert sample.pred_instances.masks.shape[1:] == SIZE


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor_trains_and_predicts(name):
    """As a whole and in sliding windows."""
    from mmseg.structures import SegDataSample

    config = load('segmentation', name)
    config.model.data_preprocessor.size = SIZE
    config.model.test_cfg = dict(mode='whole')
    model = build(smaller(config.model))
    classes = config.model.decode_head.num_classes
    meta = dict(img_shape=SIZE, ori_shape=SIZE)
    truth = [PixelData(data=torch.randint(0, classes, (1, *SIZE))) for _ in range(2)]
    samples = [SegDataSample(gt_sem_seg=labels, metainfo=meta) for labels in truth]
    whole = step_and_predict(model, samples)
    model.test_cfg.update(mode='slide', crop_size=(64, 64), stride=(48, 48))
    for sample in [*whole, *predict(model, samples)]:
        assert sample.pred_sem_seg.shape == SIZE
        assert sample.pred_sem_seg.data.max() < classes


BACKBONE = (
    "dict(_delete_=True, type='mmstrip.StripMLP', arch=dict(embed_dims=80, depths=(1, 1, 1, 1)), "
    'out_indices=(0, 1, 2, 3))'
)
CHANNELS = '[80, 160, 320, 640]'
ZOO = {
    'mmdet': {
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': f'neck=dict(in_channels={CHANNELS})',
        'gfl/gfl_r50_fpn_1x_coco.py': f'neck=dict(in_channels={CHANNELS})',
    },
    'mmseg': {
        'upernet/upernet_r50_4xb4-80k_ade20k-512x512.py': (
            f'pretrained=None, decode_head=dict(in_channels={CHANNELS}), auxiliary_head=dict(in_channels=320)'
        ),
        'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py': (
            'pretrained=None, decode_head=dict(in_channels=640), auxiliary_head=dict(in_channels=320)'
        ),
    },
}
INFERENCE = {
    'mmdet': ('init_detector', 'inference_detector', 'pred_instances.scores'),
    'mmseg': ('init_model', 'inference_model', 'pred_sem_seg.data'),
}


@pytest.mark.parametrize('toolbox, base', [(toolbox, base) for toolbox in ZOO for base in ZOO[toolbox]])
def test_zoo_configs_take_the_backbone_by_name(toolbox, base, tmp_path):
    """With the toolbox's own functions."""
    module = import_module(toolbox)
    path, changes = Path(module.__file__).parent / '.mim' / 'configs' / base, ZOO[toolbox][base]
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['{path}']\nmodel = dict(backbone={BACKBONE}, {changes})\n"
        'test_pipeline = _base_.test_pipeline\ntest_pipeline[1].update(scale=(128, 96))\n'
        'test_dataloader = dict(dataset=dict(pipeline=test_pipeline))\n'
    )
    build, infer, field = INFERENCE[toolbox]
    functions = import_module(f'{toolbox}.apis')
    model = getattr(functions, build)(str(tmp_path / 'mine.py'), None, device='cpu')
    result = getattr(functions, infer)(model, np.zeros((70, 90, 3), np.uint8))
    assert type(model.backbone).__name__ == 'StripMLP' and torch.is_tensor(attrgetter(field)(result))


def test_the_readmes_five_lines_make_a_detector(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    (code,) = (block for block in blocks if 'gfl' in block)
    assert code.count('\n') == 5
    (tmp_path / 'mine.py').write_text(code)
    config = Config.fromfile(tmp_path / 'mine.py')
    init_default_scope(config.default_scope)
    model = build(config.model)
    for sample in step_and_predict(model, [detection_sample()]):
        assert torch.isfinite(sample.pred_instances.bboxes).all()
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    assert {(group['lr'], group['weight_decay']) for group in groups} == {(1e-4, 0.05)}
    imagenet = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py').data_preprocessor
    assert config.model.data_preprocessor.std == imagenet.std and config.model.data_preprocessor.bgr_to_rgb
