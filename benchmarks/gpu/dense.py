"""One training step of a detector or segmentor on random images and truth."""

import math

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

from mmstrip.utils.config import load_config

from .. import CONFIGS
from ..speed.measuring import peak_memory, seconds_of
from .checks import WrongResultError
from .steps import NotRunError, Setting

SIZES = {'detection': (800, 1216), 'segmentation': (512, 512)}
TINY = (64, 96)


def train_one_step(task: str, config: str, setting: Setting) -> dict:
    """A step of two images.

    Args:
        task: 'detection' or 'segmentation'.
        config: Name of a config there.
        setting: Of the report.

    Returns:
        'loss', 'shape', and of a further step 'seconds' and 'peak_mib'.

    Raises:
        NotRunError: The toolbox, or what it needs, is not installed.
        WrongResultError: The loss is not finite, or a parameter of the backbone has no finite gradient.
    """
    _need_toolbox(task)
    shape = TINY if setting.tiny else SIZES[task]
    config = load_config(str(CONFIGS / task / f'{config}.py'))
    init_default_scope(config.default_scope)
    if task == 'segmentation':
        config.model.data_preprocessor.size = shape
    model = _build(_smaller(config.model) if setting.tiny else config.model).to(setting.device).train()
    if task == 'detection':
        batch = _detection_batch(shape)
    else:
        batch = _segmentation_batch(shape, config.model.decode_head.num_classes)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        data = model.data_preprocessor(batch, training=True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        return loss

    loss = step().item()
    bad = [name for name, p in model.backbone.named_parameters() if p.requires_grad and not _is_finite(p.grad)]
    if not math.isfinite(loss) or bad:
        raise WrongResultError(
            f'the loss is {loss}; parameters without a finite gradient: {", ".join(bad[:3]) or "none"}'
        )
    return dict(
        loss=round(loss, 4),
        shape=list(shape),
        seconds=round(seconds_of(step, setting.device), 4),
        peak_mib=round(peak_memory(step, setting.device) / 2**20) if setting.cuda else None,
    )


def _need_toolbox(task: str) -> None:
    toolbox = {'detection': 'mmdet', 'segmentation': 'mmseg'}[task]
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        raise NotRunError(f'{toolbox} needs the compiled ops of mmcv, which are not there: {error}') from error
    try:
        __import__(f'{toolbox}.models')
    except ImportError as error:
        raise NotRunError(f'{toolbox} is not installed: {error}') from error


def _build(model: dict) -> nn.Module:
    model.backbone.init_cfg = None
    built = MODELS.build(model)
    built.init_weights()
    return built


def _smaller(model: dict) -> dict:
    """One block a stage, and as many proposals or queries as small images ask for."""
    model.backbone.arch = dict(embed_dims=80, depths=(1, 1, 1, 1))
    if 'rpn_head' in model:
        model.train_cfg.rpn_proposal.max_per_img = 20
        model.roi_head.bbox_head.fc_out_channels = 32
    if 'num_queries' in model:
        model.num_queries = 20
        model.encoder.num_layers = model.decoder.num_layers = 1
    if 'channels' in model.get('decode_head', {}):
        model.decode_head.channels = 32
    return model


def _is_finite(grad: torch.Tensor | None) -> bool:
    return grad is not None and bool(torch.isfinite(grad).all())


def _detection_batch(shape: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(2, (3, *shape), num_items=[2, 2], num_classes=80, with_mask=True)


def _segmentation_batch(shape: tuple[int, int], classes: int) -> dict:
    from mmseg.structures import SegDataSample

    truth = PixelData(data=torch.randint(0, classes, (1, *shape)))
    sample = SegDataSample(gt_sem_seg=truth, metainfo=dict(img_shape=shape, ori_shape=shape))
    return dict(
        inputs=[torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for _ in range(2)], data_samples=[sample] * 2
    )
