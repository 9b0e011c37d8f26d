"""From a trained model to its deploy form."""

import torch
from mmengine.registry import MODELS, init_default_scope

from ..utils.checkpoints import fill_model, write_checkpoint
from ..utils.config import load_config

TOLERANCE = 1e-4


def convert_to_deploy(config: str, src: str, dst: str, trusted: bool = False) -> float:
    """Write the deploy form of a trained model, after a comparison of both forms on random images.

    Args:
        config: Config file of the model, a toolbox's with a backbone that has ``switch_to_deploy()``.
        src: Checkpoint that fills the model.
        dst: File to write: a state dict for the same config with ``model.backbone.deploy=True``, and the names of the
            classes if ``src`` has them.
        trusted: Run the code that ``src`` may ask for. Defaults to False.

    Returns:
        The largest difference between the features of both forms, relative to the largest feature.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing.
        ValueError: The backbone has no deploy form or is in it, the checkpoint does not fill the model, or the forms
            differ by more than 1e-4; nothing is written then.
    """
    settings = load_config(config)
    init_default_scope(settings.get('default_scope', 'mmengine'))
    backbone = settings.model.backbone
    if backbone.get('deploy'):
        raise ValueError(f'{config}: model.backbone.deploy is set, but the trained form is to be converted')
    backbone.init_cfg = None
    model = MODELS.build(settings.model).eval()
    if not hasattr(model.backbone, 'switch_to_deploy'):
        raise ValueError(f'{config}: {type(model.backbone).__name__} has no deploy form')
    checkpoint = fill_model(model, config, src, trusted)
    images = torch.rand(2, model.backbone.in_channels, *(side + 32 for side in model.backbone.img_size))
    with torch.no_grad():
        expected = model.backbone(images)
        model.backbone.switch_to_deploy()
        features = model.backbone(images)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, features))
    if not error < TOLERANCE:
        raise ValueError(f'{src}: the deploy form differs by {error:.1e}, more than {TOLERANCE:g}; nothing was written')
    meta = {key: value for key, value in checkpoint['meta'].items() if key == 'dataset_meta'}
    write_checkpoint(dict(state_dict=model.state_dict(), meta=dict(meta, deploy=True)), dst)
    return error
