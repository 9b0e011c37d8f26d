"""mmstrip's models in mmpretrain's ``get_model``, ``list_models`` and ``ImageClassificationInferencer``."""

from pathlib import Path

METAFILE = Path('configs', 'strip_mlp', 'metafile.yml')


def register_models() -> None:
    """Register the classifiers of mmstrip's metafile with mmpretrain. Calling it again does nothing.

    The names are those in ``configs/strip_mlp/metafile.yml``, such as 'strip-mlp-tiny_3rdparty_in1k'. Weights are local
    files: ``get_model(NAME, pretrained='checkpoints/strip-mlp-tiny_in1k.pth')``.

    Raises:
        ImportError: mmpretrain is not installed.
    """
    from mmpretrain.apis import ModelHub

    root = Path(__file__).parent / '.mim'
    if not ModelHub.has('strip-mlp-tiny_3rdparty_in1k'):
        ModelHub.register_model_index(root / METAFILE, config_prefix=root)
