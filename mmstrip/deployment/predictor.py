"""Predictions of exported files, in the form of the toolboxes' inferencers."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .description import outputs_fit, read_about
from .detections import detections_of
from .formats import DYNAMIC_SIDES, MAX_BATCH
from .preprocessing import fits, normalize, read_picture, run_steps
from .runtimes import open_session

Image = str | Path | np.ndarray


class Predictor:
    """An exported file in its runtime.

    Args:
        path: File written by ``tools/deployment/export.py``; its suffix determines the runtime.
        dtype: Type of matrix products: 'float32', or 'bfloat16' with OpenVINO. Defaults to 'float32'.
        trusted: Also open ``.pt2``, which runs code. Defaults to False.

    Attributes:
        about (dict): Description of the file: its task, classes, preprocessing, shape and options.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Its runtime is not installed.
        ValueError: See :func:`.description.read_about`; or the format or the CPU does not support ``dtype``.
    """

    def __init__(self, path: str | Path, dtype: str = 'float32', trusted: bool = False):
        self.path = Path(path)
        self.about = read_about(self.path, trusted)
        try:
            self.session = open_session(self.path, dtype, trusted)
        except (ImportError, ValueError):
            raise
        except Exception as error:  # each runtime has its own
            reason = str(error).strip().partition('\n')[0]
            raise ValueError(f'{self.path} cannot be run: {reason}') from error

    def __call__(self, images: Image | Sequence[Image], batch_size: int = 1) -> list:
        """Predict images.

        Args:
            images: A path or an array (H, W, 3) in BGR, or a list of them.
            batch_size: Largest batch of images of one size, if the file has dynamic batches. Defaults to 1.

        Returns:
            One result per image. Classifier: a dict of ``pred_scores`` (classes,), ``pred_score`` (the largest),
            ``pred_label`` and, if the file has class names, ``pred_class``. Segmentor: the label map (H, W), int64, at
            the size of the image. Detector: see :func:`.detections_of`, in pixels of the image. Backbone or neck: a
            list of maps (C, H', W').

        Raises:
            FileNotFoundError: There is no such image.
            TypeError: An image is neither a path nor an array.
            ValueError: An image cannot be read or has a size that the file does not take; the file does not take
                color images; ``batch_size`` is not a whole number from 1 to 65,535.
        """
        if self.about['channels'] != 3:
            raise ValueError(f'{self.path} takes images with {self.about["channels"]} channels, but got 3')
        several = isinstance(images, Iterable) and not isinstance(images, (str, bytes, np.ndarray))
        listed = images if several else [images]
        sizes: list[tuple] = []  # of each resized and original image; a batch's sizes come before its outputs
        found = self.outputs(self._prepared(listed, sizes), batch_size)
        return [self.result(outputs, *sizes[i]) for i, outputs in enumerate(found)]

    def _prepared(self, images: Iterable[Image], sizes: list[tuple]) -> Iterator[np.ndarray]:
        for image in images:
            picture = _read(image)
            try:
                pixels = run_steps(picture, self.about['steps'])
            except ValueError as error:
                name = 'an image' if isinstance(image, np.ndarray) else image
                raise ValueError(f'{name} does not fit {self.path}: {error}') from error
            sizes.append((pixels.shape[1:], picture.shape[:2]))
            yield pixels

    def outputs(self, pixels: Iterable[np.ndarray], batch_size: int = 1) -> Iterator[list[np.ndarray]]:
        """Outputs of each of several resized images (3, H, W), BGR in uint8.

        Raises:
            ValueError: The file does not take their size.
        """
        for some in self._batches(pixels, batch_size):
            together = self.run(np.stack(some))
            yield from ([output[k] for output in together] for k in range(len(some)))

    def run(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Outputs of a batch of resized images (N, 3, H, W), BGR in uint8.

        Raises:
            ValueError: The file does not take that shape or type, or its outputs contradict its description.
        """
        outputs = list(self.session(self.inputs(pixels)))
        shapes = [output.shape for output in outputs]
        if not outputs_fit(self.about, shapes):
            raise ValueError(f'{self.path} has output shapes {shapes}, which are not those of a {self.about["task"]}')
        return outputs

    def inputs(self, pixels: np.ndarray) -> np.ndarray:
        """The file's input for a batch of images; see :meth:`run`. Normalized unless the file does that itself.

        Raises:
            ValueError: The file does not take that shape or type.
        """
        about = self.about
        if pixels.ndim != 4 or pixels.shape[1] != about['channels'] or pixels.dtype != np.uint8:
            expected = f'(N, {about["channels"]}, H, W) in uint8'
            raise ValueError(f'{self.path} takes pixels {expected}, but got {pixels.shape} in {pixels.dtype}')
        size = pixels.shape[2:]
        least, most = DYNAMIC_SIDES
        if about['dynamic_size'] and not least <= min(size) <= max(size) <= most:
            raise ValueError(f'{self.path} takes sides of {least} to {most} pixels, but got {size[0]} x {size[1]}')
        if not about['dynamic_size'] and not fits(size, about['shape'], about['task']):
            height, width = about['shape']
            most, other = ('up to ', '') if about['task'] == 'detector' else ('', ' or --dynamic-size')
            raise ValueError(
                f'{self.path} takes images of {most}{height} x {width}, but got {size[0]} x {size[1]}; export it with '
                f'another --shape{other}'
            )
        if not about['dynamic_batch'] and len(pixels) > 1:
            raise ValueError(
                f'{self.path} takes one image at a time, but got {len(pixels)}; export it with --dynamic-batch'
            )
        if not about['normalize']:
            pixels = normalize(pixels, about['mean'], about['std'], about['flip'])
        return pixels if about['dynamic_size'] or tuple(about['shape']) == size else self._padded(pixels)

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        """Pad images on the right and at the bottom like mmdet: with one value after normalization."""
        about = self.about
        values = np.full(pixels.shape[1], about.get('pad_value', 0), np.float32)
        if about['normalize']:
            if about['mean']:
                values = values * about['std'] + about['mean']
            values = (values[::-1] if about['flip'] else values).round().clip(0, 255)
        padded = np.empty((*pixels.shape[:2], *about['shape']), pixels.dtype)
        padded[:] = values[:, None, None]
        padded[:, :, : pixels.shape[2], : pixels.shape[3]] = pixels
        return padded

    def _batches(self, pixels: Iterable[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
        """Group consecutive images of one size."""
        if batch_size not in range(1, MAX_BATCH + 1):
            raise ValueError(f'batch_size must be a whole number from 1 to {MAX_BATCH}, but got {batch_size!r}')
        largest = batch_size if self.about['dynamic_batch'] else 1
        for _, images in groupby(pixels, np.shape):
            while batch := list(islice(images, largest)):
                yield batch

    def result(
        self, outputs: list[np.ndarray], inside: tuple[int, int], size: tuple[int, int]
    ) -> dict | np.ndarray | list[np.ndarray]:
        """Convert an image's outputs to its result; see :meth:`__call__`.

        Args:
            outputs: See :meth:`outputs`.
            inside: Height and width of the resized image.
            size: Height and width of the original image.
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
        threshold = self.about['threshold']
        if len(logits) > 1 or threshold is None:
            return logits.argmax(0).numpy()
        return (logits[0].sigmoid() > threshold).long().numpy()


def _read(image: Image) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f'an image must be an array (H, W, 3) in uint8, but got {image.shape} in {image.dtype}')
        return image
    if not isinstance(image, (str, Path)):
        raise TypeError(f'an image must be a path or an array (H, W, 3) in BGR, but got {type(image).__name__}')
    if not Path(image).is_file():
        raise FileNotFoundError(f'no image at {image}')
    return read_picture(image)


load = Predictor
