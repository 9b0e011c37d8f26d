"""Predictions of exported files, as the toolboxes' inferencers give them."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import DYNAMIC_SIDES, read_about
from .preprocessing import normalise, run_steps
from .runtimes import open_session

Image = str | Path | np.ndarray


class Predictor:
    """An exported file in its runtime.

    Args:
        path: File of ``tools/deployment/export.py``; its ending says which runtime.
        dtype: What products are computed in: 'float32', or 'bfloat16' of OpenVINO's files. Defaults to 'float32'.

    Attributes:
        about (dict): What the file says of itself: its task, classes, preprocessing, shape and options.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or was not exported here; the format or the machine does not compute in that type.
    """

    def __init__(self, path: str | Path, dtype: str = 'float32'):
        self.path = Path(path)
        self.about = read_about(self.path)
        self.session = open_session(self.path, dtype)

    def __call__(self, images: Image | Sequence[Image], batch_size: int = 1) -> list:
        """Predict pictures.

        Args:
            images: A path or an array (H, W, 3) in BGR, or a list of them.
            batch_size: Pictures at a time, where a file takes any batch and they have one size. Defaults to 1.

        Returns:
            One result for each picture. Of a classifier a dict: ``pred_scores``, (classes,), its largest
            ``pred_score``, that one's ``pred_label`` and, if the file knows classes, ``pred_class``. Of a segmentor
            the label map (H, W), int64, at the picture's size. Of a backbone or neck a list of maps (C, H', W').

        Raises:
            FileNotFoundError: There is no such picture.
            ValueError: It cannot be read, or has a size that the file does not take.
        """
        listed = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        pictures = [_read(image) for image in listed]
        outputs = self.outputs([run_steps(picture, self.about['steps']) for picture in pictures], batch_size)
        return [self.result(own, picture.shape[:2]) for own, picture in zip(outputs, pictures)]

    def outputs(self, pixels: Sequence[np.ndarray], batch_size: int = 1) -> list[list[np.ndarray]]:
        """The outputs of each of several images (3, H, W), BGR in uint8, that need no resizing.

        Raises:
            ValueError: The file does not take their size.
        """
        found = []
        for some in self._batches(pixels, batch_size):
            together = self.run(np.stack([pixels[i] for i in some]))
            found += [[output[k] for output in together] for k in range(len(some))]
        return found

    def run(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Outputs of pixels (N, 3, H, W), BGR in uint8, that need no resizing.

        Raises:
            ValueError: The file does not take that size or batch.
        """
        return list(self.session(self.inputs(pixels)))

    def inputs(self, pixels: np.ndarray) -> np.ndarray:
        """The file's input for such pixels: normalised, where it does not do that itself.

        Raises:
            ValueError: The file does not take that size or batch.
        """
        about = self.about
        size = pixels.shape[2:]
        least, most = DYNAMIC_SIDES
        if about['dynamic_size'] and not least <= min(size) <= max(size) <= most:
            raise ValueError(f'{self.path} takes sides of {least} to {most} pixels, but got {size[0]} x {size[1]}')
        if not about['dynamic_size'] and list(size) != about['shape']:
            height, width = about['shape']
            raise ValueError(f'{self.path} takes images of {height} x {width}, but got {size[0]} x {size[1]}')
        if not about['dynamic_batch'] and len(pixels) > 1:
            raise ValueError(f'{self.path} takes one image at a time, but got {len(pixels)}')
        if not about['normalize']:
            pixels = normalise(pixels, about['mean'], about['std'], about['flip'])
        return pixels

    def _batches(self, pixels: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
        """Neighbours of one size together."""
        largest = batch_size if self.about['dynamic_batch'] else 1
        batches: list[list[int]] = []
        for i, image in enumerate(pixels):
            if batches and len(batches[-1]) < largest and pixels[batches[-1][0]].shape == image.shape:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def result(self, outputs: list[np.ndarray], size: tuple[int, int]):
        """What an image's outputs say of its picture, which has ``size`` (height, width); see :meth:`__call__`."""
        if self.about['task'] == 'classifier':
            return self._classified(torch.from_numpy(outputs[0]))
        if self.about['task'] == 'segmentor':
            return self._segmented(torch.from_numpy(outputs[0]), size)
        return outputs

    def _classified(self, output: Tensor) -> dict:
        scores = output if self.about['scores'] else output.softmax(0)
        label = int(scores.argmax())
        result = dict(pred_scores=scores.numpy(), pred_label=label, pred_score=float(scores[label]))
        classes = self.about['classes']
        return result if classes is None else dict(result, pred_class=classes[label])

    def _segmented(self, logits: Tensor, size: tuple[int, int]) -> np.ndarray:
        align = self.about['align_corners']
        logits = F.interpolate(logits[None], size=size, mode='bilinear', align_corners=align)[0]
        if len(logits) > 1:
            return logits.argmax(0).numpy()
        return (logits[0].sigmoid() > self.about['threshold']).long().numpy()


def _read(image: Image) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f'pictures are arrays (H, W, 3) in uint8, but got {image.shape} in {image.dtype}')
        return image
    if not Path(image).is_file():
        raise FileNotFoundError(f'no picture at {image}')
    picture = mmcv.imread(str(image))
    if picture is None:
        raise ValueError(f'{image} cannot be read as a picture')
    return picture


load = Predictor
