"""mmstrip's models by their names in mmpretrain: ``get_model``, ``list_models``, ``ImageClassificationInferencer``."""

from pathlib import Path

METAFILE = Path('configs', 'strip_mlp', 'metafile.yml')


def register_models() -> None:
    """Tell mmpretrain of the classifiers in mmstrip's metafile; calling it again does nothing.

    The names are those of ``configs/strip_mlp/metafile.yml``, such as 'strip-mlp-tiny_3rdparty_in1k'. Weights are files
    of yours: ``get_model(NAME, pretrained='checkpoints/strip-mlp-tiny_in1k.pth')``.

    Raises:
        ImportError: mmpretrain is not installed.
    """
    from mmpretrain.apis import ModelHub

    root = Path(__file__).parent / '.mim'
    if not ModelHub.has('strip-mlp-tiny_3rdparty_in1k'):
        ModelHub.register_model_index(root / METAFILE, config_prefix=root)
