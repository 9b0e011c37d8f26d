"""Label maps for semantic segmentation."""

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations

from ..registry import TRANSFORMS

IGNORED = 255


@TRANSFORMS.register_module()
class LoadSegMap(LoadAnnotations):
    """Load a label map as mmseg does, check its values, and name the file in every error.

    Args:
        num_classes (int): Number of classes; labels are 0 to ``num_classes - 1``, or 255 to ignore a pixel.
        **kwargs: Further arguments of :class:`mmseg.datasets.transforms.LoadAnnotations`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as an image, has another size than its image, or holds other labels.
    """

    def __init__(self, num_classes: int, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def _load_seg_map(self, results: dict) -> None:
        path = results['seg_map_path']
        try:
            super()._load_seg_map(results)
        except FileNotFoundError:
            raise FileNotFoundError(f'no label map {path} for the image {results.get("img_path")}') from None
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f'{path} is not a readable label map: {error}') from error
        labels = results['gt_seg_map']
        shape = results.get('ori_shape', labels.shape)
        if labels.shape != tuple(shape):
            raise ValueError(
                f'{path} must be a label map of {tuple(shape)} pixels as its image, but has {labels.shape}'
            )
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=IGNORED + 1))
        wrong = present[(present >= self.num_classes) & (present != IGNORED)]
        if wrong.size:
            reduced = ' once its zero label is taken off' if self.reduce_zero_label else ''
            raise ValueError(
                f'{path} must hold labels from 0 to {self.num_classes - 1}, or {IGNORED} to ignore a pixel, but has '
                f'{", ".join(map(str, wrong[:5]))}{reduced}'
            )
