"""Predictions of exported files, as the toolboxes' inferencers give them."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .detections import detections_of
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
            the label map (H, W), int64, at the picture's size. Of a detector a dict of :func:`.detections_of`, in the
            picture's pixels. Of a backbone or neck a list of maps (C, H', W').

        Raises:
            FileNotFoundError: There is no such picture.
            ValueError: It cannot be read, or has a size that the file does not take.
        """
        listed = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        pictures = [_read(image) for image in listed]
        pixels = [run_steps(picture, self.about['steps']) for picture in pictures]
        found = zip(self.outputs(pixels, batch_size), pixels, pictures)
        return [self.result(outputs, image.shape[1:], picture.shape[:2]) for outputs, image, picture in found]

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
        room = [side - own for side, own in zip(about['shape'], size)]
        smaller = about['task'] == 'detector' and min(room) >= 0
        if not about['dynamic_size'] and any(room) and not smaller:
            limit = f'{"up to " if about["task"] == "detector" else ""}{about["shape"][0]} x {about["shape"][1]}'
            raise ValueError(f'{self.path} takes images of {limit}, but got {size[0]} x {size[1]}')
        if not about['dynamic_batch'] and len(pixels) > 1:
            raise ValueError(f'{self.path} takes one image at a time, but got {len(pixels)}')
        if not about['normalize']:
            pixels = normalise(pixels, about['mean'], about['std'], about['flip'])
        return self._padded(pixels, room) if smaller and any(room) else pixels

    def _padded(self, pixels: np.ndarray, room: Sequence[int]) -> np.ndarray:
        """Images with values of 0 after normalisation below and beside them, as mmdet pads them in a batch."""
        mean = self.about['mean'] if self.about['normalize'] and self.about['mean'] else [0.0] * pixels.shape[1]
        values = np.asarray(mean[::-1] if self.about['flip'] else mean).round().astype(pixels.dtype)[:, None, None]
        padded = np.broadcast_to(values, (1, len(values), *self.about['shape'])).copy()
        padded[:, :, : pixels.shape[2], : pixels.shape[3]] = pixels
        return padded

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

    def result(self, outputs: list[np.ndarray], inside: tuple[int, int], size: tuple[int, int]):
        """What an image's outputs say of its picture; see :meth:`__call__`.

        Args:
            outputs: Of the image, as of :meth:`outputs`.
            inside: Height and width of the image.
            size: Those of the picture.
        """
        if self.about['task'] == 'classifier':
            return self._classified(torch.from_numpy(outputs[0]))
        if self.about['task'] == 'segmentor':
            return self._segmented(torch.from_numpy(outputs[0]), size)
        if self.about['task'] == 'detector':
            return detections_of(outputs, self.about, inside, size)
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
