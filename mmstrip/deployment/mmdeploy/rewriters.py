"""Rewriters: what mmdeploy traces in place of methods of mmdet's heads.

mmdeploy's own rewriters select other boxes than mmdet: among all levels of a region proposal network at once, and only
among the most likely classes. These select the same boxes as mmdet.
"""

import io

import onnx
import torch
from mmdeploy.codebase.mmdet.deploy.object_detection import MMDetection
from mmdeploy.core import FUNCTION_REWRITER, SYMBOLIC_REWRITER, RewriterContext
from mmdeploy.mmcv.ops.nms import ONNXNMSop
from mmdeploy.utils import IR
from mmengine.config import Config
from torch import Tensor, nn

from . import CONFIG, MIN_OPSET, OPSET

MMDetection.register_all_modules()
_HEADS = 'mmdet.models'
_MIN_SCORE = 1e-20  # smallest score of a box; the others have 0


def rewrite(name: str):
    return FUNCTION_REWRITER.register_rewriter(f'{_HEADS}.{name}', backend='onnxruntime')


def select_boxes(boxes: Tensor, scores: Tensor, test_cfg: dict) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression, then the best boxes.

    Args:
        boxes: (groups, boxes, 4).
        scores: (groups, classes, boxes), 0 for no box; either groups or classes is 1.
        test_cfg: mmdet's test config, with ``nms`` and ``max_per_img``.

    Returns:
        Boxes with scores (1, n, 5), best first, and their classes or groups (1, n). A box of score 0 is added, as
        runtimes disagree about empty tensors.
    """
    kind = test_cfg['nms'].get('type', 'nms')
    if kind != 'nms' or test_cfg['nms'].get('class_agnostic'):
        raise ValueError(f"only per-class nms of type 'nms' can be exported, but test_cfg.nms is {test_cfg['nms']}")
    if test_cfg.get('min_bbox_size', -1) >= 0:
        sides = (boxes[..., 2:] - boxes[..., :2]).amin(2)
        scores = torch.where((sides > test_cfg['min_bbox_size'])[:, None], scores, torch.zeros_like(scores))
    most = test_cfg['max_per_img']
    limits = (torch.tensor([value], dtype=torch.float32) for value in (test_cfg['nms']['iou_threshold'], _MIN_SCORE))
    found = ONNXNMSop.apply(boxes, scores, most, *limits)
    groups, classes, places = found[:, 0], found[:, 1], found[:, 2]
    chosen = torch.cat([boxes[groups, places], scores[groups, classes, places][:, None]], 1)
    chosen = torch.cat([chosen, chosen.new_zeros(1, 5)])
    labels = torch.cat([groups + classes, groups.new_zeros(1)])
    best = chosen[:, 4].topk(most)[1]
    return chosen[best][None], labels[best][None]


def _one_of(labels: Tensor, count: int, scores: Tensor) -> Tensor:
    """Scores (1, count, boxes) of boxes with one class each."""
    own = labels[None] == torch.arange(count)[:, None]
    return torch.where(own, scores, torch.zeros_like(scores))[None]


def _best(self, cls_scores, bbox_preds, score_factors, batch_img_metas, cfg) -> tuple[Tensor, ...]:
    """Scores, classes, levels and boxes of the best locations of each level."""
    sizes = [tuple(map(int, map_.shape[2:])) for map_ in cls_scores]
    found = []
    for level, priors in enumerate(self.prior_generator.grid_priors(sizes, device=cls_scores[0].device)):
        scores = cls_scores[level][0].permute(1, 2, 0).reshape(-1, self.cls_out_channels)
        scores = scores.sigmoid() if self.use_sigmoid_cls else scores.softmax(1)[:, :-1]
        classes = scores.shape[1]
        scores = torch.where(scores > cfg.get('score_thr', 0), scores, torch.zeros_like(scores))
        scores, best = scores.flatten().topk(min(cfg.get('nms_pre', scores.numel()), int(scores.numel())))
        places = torch.div(best, classes, rounding_mode='floor')
        deltas = bbox_preds[level][0].permute(1, 2, 0).reshape(-1, self.bbox_coder.encode_size)
        if score_factors is not None:
            scores = scores * score_factors[level][0].permute(1, 2, 0).flatten().sigmoid()[places]
        found.append((scores, best % classes, torch.full_like(best, level), deltas[places], priors.data[places]))
    scores, labels, levels, deltas, priors = (torch.cat(parts) for parts in zip(*found))
    boxes = self.bbox_coder.decode(priors[None], deltas[None], max_shape=batch_img_metas[0]['img_shape'])
    return scores, labels, levels, boxes


@rewrite('dense_heads.base_dense_head.BaseDenseHead.predict_by_feat')
def dense_head(self, cls_scores, bbox_preds, score_factors=None, batch_img_metas=None, cfg=None, **_):
    cfg = self.test_cfg if cfg is None else cfg
    scores, labels, _, boxes = _best(self, cls_scores, bbox_preds, score_factors, batch_img_metas, cfg)
    return select_boxes(boxes, _one_of(labels, self.num_classes, scores), cfg)


@rewrite('dense_heads.rpn_head.RPNHead.predict_by_feat')
def proposals(self, cls_scores, bbox_preds, score_factors=None, batch_img_metas=None, cfg=None, **_):
    cfg = self.test_cfg if cfg is None else cfg
    scores, _, levels, boxes = _best(self, cls_scores, bbox_preds, None, batch_img_metas, cfg)
    return select_boxes(boxes, _one_of(levels, len(cls_scores), scores), cfg)


@rewrite('roi_heads.bbox_heads.bbox_head.BBoxHead.predict_by_feat')
def second_stage(self, rois, cls_scores, bbox_preds, batch_img_metas, rcnn_test_cfg=None, **_):
    activate = self.loss_cls.get_activation if self.custom_cls_channels else lambda scores: scores.softmax(-1)
    scores = activate(cls_scores)[0, :, : self.num_classes].T
    rois = rois[0, :, 1:]
    real = (rois[:, 2:] - rois[:, :2]).amin(1) > 0  # the added proposal is empty
    scores = torch.where((scores > rcnn_test_cfg['score_thr']) & real, scores, torch.zeros_like(scores))
    shape = batch_img_metas[0]['img_shape']
    if self.reg_class_agnostic:
        boxes = self.bbox_coder.decode(rois[None], bbox_preds, max_shape=shape)
        return select_boxes(boxes, scores[None], rcnn_test_cfg)
    deltas = bbox_preds[0].reshape(-1, self.num_classes, 4).permute(1, 0, 2)
    boxes = self.bbox_coder.decode(rois[None].expand_as(deltas), deltas, max_shape=shape)
    return select_boxes(boxes, scores[:, None], rcnn_test_cfg)


@rewrite('roi_heads.bbox_heads.bbox_head.BBoxHead.regress_by_class')
def next_boxes(self, priors, label, bbox_pred, img_meta):
    """Boxes for the next stage of a cascade; mmdeploy only decodes batches."""
    if not self.reg_class_agnostic:
        bbox_pred = bbox_pred.reshape(len(priors), -1, 4)[torch.arange(len(priors)), label]
    return self.bbox_coder.decode(priors[None], bbox_pred[None], max_shape=img_meta['img_shape'])[0]


@rewrite('roi_heads.cascade_roi_head.CascadeRoIHead.predict_bbox')
def cascade(self, x, batch_img_metas, rpn_results_list, rcnn_test_cfg, **_):
    """mmdet's own refinement; mmdeploy's needs class-agnostic boxes."""
    rois = _rois(rpn_results_list[0])
    rois, cls_scores, bbox_preds = self._refine_roi(x, rois, batch_img_metas, (len(rois),))
    return self.bbox_head[-1].predict_by_feat(
        rois=rois[0][None],
        cls_scores=cls_scores[0][None],
        bbox_preds=bbox_preds[0][None],
        batch_img_metas=batch_img_metas,
        rcnn_test_cfg=rcnn_test_cfg,
    )


def _rois(boxes: Tensor) -> Tensor:
    """RoIs of one image from boxes with scores (1, n, 5)."""
    return torch.cat([torch.zeros_like(boxes[0, :, :1]), boxes[0, :, :4]], 1)


@rewrite('roi_heads.mask_heads.fcn_mask_head.FCNMaskHead.predict_by_feat')
def masks(self, mask_preds, results_list, *_, **__):
    """Probabilities (h, w) of each box's class; predictions paste them into the image."""
    labels = results_list[1][0]
    chosen = mask_preds[:, 0] if self.class_agnostic else mask_preds[torch.arange(len(labels)), labels]
    return chosen.sigmoid()


@rewrite('roi_heads.cascade_roi_head.CascadeRoIHead.predict_mask')
def cascade_masks(self, x, batch_img_metas, results_list, **_):
    """Mean of the stages' probabilities; mmdeploy averages the maps before the sigmoid."""
    rois = _rois(results_list[0])
    stages = [self._mask_forward(stage, x, rois)['mask_preds'] for stage in range(self.num_stages)]
    stages = [head.predict_by_feat(preds, results_list) for head, preds in zip(self.mask_head, stages)]
    return *results_list, torch.stack(stages).mean(0)[None]


@SYMBOLIC_REWRITER.register_symbolic('mmcv.ops.roi_align.__self__', backend='onnxruntime')
def roi_align(g, features, rois, output_size, spatial_scale, sampling_ratio, pool_mode, aligned):
    """ONNX's RoiAlign; mmdeploy's symbolic needs a function that PyTorch has dropped."""
    parts = [g.op('Constant', value_t=torch.tensor(columns)) for columns in (0, [1, 2, 3, 4])]
    image, boxes = (g.op('Gather', rois, columns, axis_i=1) for columns in parts)
    return g.op(
        'RoiAlign',
        features,
        boxes,
        g.op('Cast', image, to_i=torch.onnx.TensorProtoDataType.INT64),
        output_height_i=output_size[0],
        output_width_i=output_size[1],
        spatial_scale_f=spatial_scale,
        sampling_ratio_i=sampling_ratio,
        mode_s=pool_mode,
        coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel',
    )


def trace_detector(network: nn.Module, images: Tensor, names: list[str], opset: int | None = None) -> onnx.ModelProto:
    """Convert a detector to ONNX.

    Args:
        network: :class:`..export.Network` of a detector.
        images: (1, C, H, W).
        names: Names of the outputs: boxes with scores, labels and, if any, masks.
        opset: ONNX opset version, at least 16. Defaults to 17.

    Raises:
        ValueError: It cannot be traced.
    """
    opset = opset or OPSET
    if opset < MIN_OPSET:
        raise ValueError(f'--opset must be at least {MIN_OPSET} for detectors, but got {opset}')
    config, file, name = Config(CONFIG), io.BytesIO(), type(network.model).__name__
    config.onnx_config.opset_version = opset
    try:
        with RewriterContext(cfg=config, backend=config.backend_config.type, ir=IR.ONNX, opset=opset):
            torch.onnx.export(
                network,
                (images,),
                file,
                dynamo=False,
                autograd_inlining=False,  # keep non-maximum suppression one ONNX operator
                opset_version=opset,
                input_names=['images'],
                output_names=names,
            )
    except Exception as error:  # each library has its own
        reason = str(error).strip().rpartition('\n')[2]
        raise ValueError(
            f'{name} cannot be traced by mmdeploy ({type(error).__name__}: {reason}); export its backbone (--features) '
            'or neck (--neck)'
        ) from error
    return onnx.load_from_string(file.getvalue())
