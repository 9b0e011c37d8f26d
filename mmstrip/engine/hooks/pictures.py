"""Pictures of test predictions."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mmcv
import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from ...registry import HOOKS
from ...utils.plots import drawable, legible
from ...utils.wrappers import unwrap_model

SMALLEST_SIDE = 256  # pixels: labels would cover smaller pictures of a classifier


@HOOKS.register_module()
class PredictionPicturesHook(Hook):
    """Save pictures of test predictions next to the ground truth, drawn by the toolbox's visualizer.

    It replaces the toolboxes' hooks: mmpretrain's writes images of one name in different folders to one file, mmdet's
    has no interval, and mmseg's writes to the log folder. With several processes, rank 0 draws its share of the images.

    Args:
        out_dir (str): Folder to write to. A picture has the name of its image, in subfolders named like the images'.
        interval (int): Draw every n-th image. Defaults to 1.

    Raises:
        ValueError: ``interval`` is not a positive int, or the visualizer is not a toolbox's.
    """

    def __init__(self, out_dir: str, interval: int = 1):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive int, but got {interval!r}')
        self.out_dir = Path(out_dir)
        self.interval = interval

    def before_test(self, runner: Runner) -> None:
        visualizer = runner.visualizer
        if not hasattr(visualizer, 'visualize_cls') and type(visualizer).add_datasample is Visualizer.add_datasample:
            raise ValueError(
                "pictures need a toolbox's visualizer, such as mmdet.DetLocalVisualizer, but the config has mmengine's "
                + type(visualizer).__name__
            )
        self.seen = 0
        self.taken: set[str] = set()
        self.names = picture_names(_image_paths(runner.test_dataloader.dataset)) if is_main_process() else {}

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        if not is_main_process():
            return
        with _legible_classes(runner.visualizer):
            for place, sample in enumerate(outputs):
                if self.seen % self.interval == 0:
                    path = sample.get('img_path')
                    name = self._free_name(path or str(self.seen))
                    stored = path and ('://' in path or os.path.isfile(path))  # else made in memory
                    in_memory = hasattr(runner.visualizer, 'visualize_cls') and not stored
                    image = _input(runner, data_batch, place) if in_memory else mmcv.imread(path, channel_order='rgb')
                    _draw(runner.visualizer, name, image, sample, str(self.out_dir / f'{name}.png'))
                self.seen += 1

    def _free_name(self, path: str) -> str:
        name = self.names.get(path) or Path(path).stem
        while name in self.taken:  # a duplicate, or the dataset does not list its images
            name += '_'
        self.taken.add(name)
        return name


def picture_names(paths: Iterable[str]) -> dict[str, str]:
    """Path of each image -> the same path within the folder that holds them all, without its suffix."""
    whole = {path: os.path.abspath(path) for path in paths}
    root = os.path.commonpath(map(os.path.dirname, whole.values())) if whole else ''
    return {path: os.path.splitext(os.path.relpath(file, root))[0] for path, file in whole.items()}


def _image_paths(dataset) -> Iterator[str]:
    if hasattr(dataset, 'get_data_info'):
        paths = (dataset.get_data_info(index).get('img_path') for index in range(len(dataset)))
        yield from (path for path in paths if isinstance(path, str))


def _input(runner: Runner, data_batch: dict, place: int) -> np.ndarray:
    """An image of a batch, (H, W, 3) in RGB; with test-time augmentation, its first view."""
    images = data_batch['inputs'][0] if isinstance(runner.model, BaseTTAModel) else data_batch['inputs']
    image = images[place]
    if getattr(unwrap_model(runner.model).data_preprocessor, 'to_rgb', False):
        image = image.flip(0)  # from BGR
    return image.permute(1, 2, 0).cpu().numpy().clip(0, 255).astype(np.uint8)


def _draw(visualizer: Visualizer, name: str, image: np.ndarray, sample, path: str) -> None:
    if not hasattr(visualizer, 'visualize_cls'):
        visualizer.add_datasample(name, image, sample, out_file=path)
        return
    classes = list((visualizer.dataset_meta or {}).get('classes') or ())
    classes += map(str, range(len(classes), sample.get('num_classes', 0)))  # a head may have more classes
    side = max(SMALLEST_SIDE, min(image.shape[:2]))
    visualizer.visualize_cls(image, sample, classes=classes, resize=side, out_file=path, name=name)


@contextmanager
def _legible_classes(visualizer: Visualizer) -> Iterator[None]:
    """Draw class names literally, on one line."""
    meta = visualizer.dataset_meta or {}
    names = [drawable(name) for name in meta.get('classes') or ()]
    if names:
        visualizer.dataset_meta = {**meta, 'classes': names}
    own = hasattr(visualizer, '_get_center_loc') and not ''.join(names).isascii()
    if own:  # mmseg's draws with an OpenCV font that has ASCII only
        visualizer._draw_sem_seg = partial(_draw_segments, visualizer)
    try:
        with legible(names):
            yield
    finally:
        visualizer.dataset_meta = meta
        if own:
            del visualizer._draw_sem_seg


def _draw_segments(visualizer, image: np.ndarray, segments, classes, palette, with_labels: bool = True) -> np.ndarray:
    drawn = type(visualizer)._draw_sem_seg(visualizer, image, segments, classes, palette, False)
    if not with_labels:
        return drawn
    labels = np.asarray(segments.cpu().data)[0]
    for label in np.unique(labels[labels < len(classes)]):
        box = dict(facecolor=tuple(np.array(palette[label]) / 255), edgecolor='black', pad=1)
        place = visualizer._get_center_loc(np.uint8(labels == label))
        visualizer.draw_texts(classes[label], place, colors='w', bboxes=box)
    return visualizer.get_image()
