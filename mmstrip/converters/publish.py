"""A trained model as a file to publish: its weights and the names of its classes."""

from pathlib import Path

from ..utils.checkpoints import load_full_checkpoint, write_checkpoint
from ..utils.config import build_model, load_model_config


def publish_model(config: str, src: str, dst: str, half: bool = False, trusted: bool = False) -> dict:
    """Write the weights of a checkpoint without the state of its training.

    Args:
        config: Config file of the model.
        src: Checkpoint that fills the model.
        dst: File to write; as safetensors if it ends in ``.safetensors``.
        half: Store floating-point weights in float16. Models load them as float32. Defaults to False.
        trusted: Run the code that ``src`` may ask for. Defaults to False.

    Returns:
        The file's metadata: 'config' (its name) and, if ``src`` has them, 'dataset_meta' with the 'classes'.

    Raises:
        FileNotFoundError: The config or the checkpoint is missing.
        ValueError: The checkpoint does not fill the model, or a weight is too large for float16. Nothing is written.
    """
    settings = load_model_config(config)
    model = build_model(settings.model)
    checkpoint = load_full_checkpoint(model, config, src, trusted)
    weights = model.state_dict()
    if half:
        weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        large = [key for key, value in weights.items() if not value.isfinite().all()]
        if large:
            raise ValueError(f'{src}: {large[0]} has values that float16 cannot hold; publish it without --half')
    meta = dict(config=Path(config).stem)
    if 'dataset_meta' in checkpoint['meta']:
        meta['dataset_meta'] = checkpoint['meta']['dataset_meta']
    write_checkpoint(dict(state_dict=weights, meta=meta), dst)
    return meta
