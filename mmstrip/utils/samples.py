"""Samples of any dataset, with errors that name the file at fault, whichever transform reads it."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import mmcv
import numpy as np
from mmengine.fileio import get
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

IGNORED = 255
ORIENTATION = 0x0112  # of EXIF
WIDTH, HEIGHT, BITS = 256, 257, 258  # of TIFF
TAIL = 2**16  # bytes searched for the end marker of a file
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


class UnreadableImageError(ValueError):
    """A file that cannot be read as an image."""


def inspect_image(path: str | Path) -> tuple[tuple[int, int], int]:
    """Width and height of an image as it is loaded for training, and the bits per channel of its file.

    The loader rotates some formats by their EXIF orientation and others not. Complete JPEG and PNG files without an
    orientation are judged by their headers; all other files are decoded.

    Raises:
        ValueError: The image cannot be loaded.
    """
    try:
        with open(path, 'rb') as file, Image.open(file) as image:
            bits, trusted = _bits(image), _is_as_stored(image, file)
            content = b'' if trusted else Path(path).read_bytes()
            if image.format == 'TIFF' and any(tiff_tags(path).count(side) != 1 for side in (WIDTH, HEIGHT)):
                raise ValueError('its header has more than one width or height')
            shape = image.size[::-1] if trusted else getattr(mmcv.imfrombytes(content), 'shape', None)
    except Exception as error:  # each format raises errors of its own
        raise ValueError(reason_of(error)) from error
    if shape is None:
        raise ValueError(f'OpenCV cannot decode it ({image.format}, {bits} bits)')
    return (shape[1], shape[0]), bits


def reason_of(error: Exception) -> str:
    """The first line of an image library's error."""
    if isinstance(error, UnidentifiedImageError):  # whose message names an object in memory
        return 'unknown image format'
    return str(error).strip().split('\n')[0] or type(error).__name__


def _bits(image: Image.Image) -> int:
    if image.format == 'PNG':
        image.fp.seek(24)
        return image.fp.read(1)[0]
    if image.format == 'TIFF':
        return max(image.tag_v2.get(BITS, (1,)))
    return 16 if image.mode[0] in 'IF' else 8


def _is_as_stored(image: Image.Image, file: BinaryIO) -> bool:
    """Whether an image, its header read from a file, is a complete JPEG or PNG that no loader rotates."""
    file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - TAIL))  # a preview in the header has an end marker too
    tail = file.read()
    if image.format == 'PNG':
        return b'IEND' in tail and b'eXIf' not in tail and 'exif' not in image.info
    if image.format != 'JPEG' or b'\xff\xd9' not in tail:
        return False
    try:
        return image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # broken EXIF data, in many ways
        return False


def tiff_tags(path: str | Path) -> list[int]:
    """Tags in a TIFF header. Of duplicate tags, Pillow, which checks sizes, uses the last, OpenCV the first."""
    with open(path, 'rb') as file:
        head = file.read(16)
        order, is_big = '<' if head[:1] == b'I' else '>', 43 in head[2:4]
        file.seek(struct.unpack_from(f'{order}Q' if is_big else f'{order}I', head, 8 if is_big else 4)[0])
        (count,) = struct.unpack(f'{order}Q' if is_big else f'{order}H', file.read(8 if is_big else 2))
        size = 20 if is_big else 12
        return np.frombuffer(file.read(size * min(count, 2**16)), f'{order}u2')[:: size // 2].tolist()


def read_sample(dataset: Dataset, index: int) -> Any:
    """Return ``dataset[index]``. If that fails, examine the sample's files; label maps are always checked.

    Errors of a dataset without ``get_data_info`` stay as they are.

    Raises:
        FileNotFoundError: The image or its label map is missing.
        UnreadableImageError: The image cannot be read.
        ValueError: The label map cannot be read, differs in size from its image, or contains labels of no class.
    """
    try:
        sample = dataset[index]
    except Exception as error:  # of any transform; raised again unless a file explains it
        if hasattr(dataset, 'get_data_info'):
            _find_bad_file(dataset.get_data_info(index), error)
        raise
    labelled = sample.get('data_samples') if isinstance(sample, dict) else None
    if getattr(labelled, 'seg_map_path', None) and 'gt_sem_seg' in labelled:
        _check_size(labelled.seg_map_path, labelled.img_path, labelled.get('ori_shape'))
        ignored = getattr(_inner(dataset, index), 'ignore_index', IGNORED)
        _check_labels(labelled, len(dataset.metainfo['classes']), ignored)
    return sample


def _wrapped(dataset: Dataset) -> list[Dataset]:
    """The datasets in a wrapper such as RepeatDataset or ConcatDataset; none for another dataset."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    return [one for one in inner if hasattr(one, '__getitem__') and not isinstance(one, str)]


def _inner(dataset: Dataset, index: int) -> Dataset:
    """The dataset inside wrappers that gives a sample."""
    inner = _wrapped(dataset)
    if hasattr(dataset, 'ignore_index') or not inner:
        return dataset
    place = dataset._get_ori_dataset_idx(index) if hasattr(dataset, '_get_ori_dataset_idx') else index
    which, index = place if isinstance(place, tuple) else (0, place)
    return _inner(inner[which], index)


def count_images(dataset: Dataset) -> int:
    """Number of samples of a dataset, not counting repetitions by wrappers."""
    inner = _wrapped(dataset)
    return min(len(dataset), sum(map(count_images, inner))) if inner else len(dataset)


def image_files(batch: object) -> Iterator[str]:
    """Image files named in the data samples of a batch, nested in dicts and lists."""
    if isinstance(batch, (dict, list, tuple)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from image_files(part)
    elif isinstance(path := getattr(batch, 'img_path', None), str):
        yield path


def _find_bad_file(info: dict, error: Exception) -> None:
    """Raise an error that names the image or the label map if it cannot be read."""
    image, labels = info.get('img_path'), info.get('seg_map_path')
    if isinstance(image, str):
        _check_readable(image, f'no image file at {image}', 'image', UnreadableImageError, error)
    if isinstance(labels, str):
        _check_readable(labels, f'no label map at {labels} for image {image}', 'label map', ValueError, error)
        _check_size(labels, image)


def _check_readable(path: str, missing: str, kind: str, unreadable: type[ValueError], error: Exception) -> None:
    try:
        _decode(path)
    except FileNotFoundError:
        raise FileNotFoundError(missing) from error
    except ValueError as reason:
        raise unreadable(f'{path} is not a readable {kind}: {reason}') from error


def _decode(path: str) -> None:
    """Raise FileNotFoundError, or ValueError if one of mmcv's usual backends cannot decode an image."""
    content = get(path)
    if not path.lower().endswith(IMAGE_SUFFIXES):
        return  # for custom transforms
    for backend in ('cv2', 'pillow'):
        try:
            image = mmcv.imfrombytes(content, backend=backend)
        except Exception as error:  # each backend raises errors of its own
            raise ValueError(reason_of(error)) from error
        if image is None:
            raise ValueError(f'{backend} cannot decode its {len(content)} bytes')


def _check_size(labels: str, image: str, shape: tuple[int, int] | None = None) -> None:
    if os.path.isfile(labels) and os.path.isfile(image):  # not on a server
        try:
            with Image.open(labels) as opened:
                found = opened.size[::-1]
            shape = tuple(shape or inspect_image(image)[0][::-1])
        except (UnidentifiedImageError, ValueError):  # of another kind, such as .npy, for custom transforms
            return
        if found != shape:
            raise ValueError(f'{labels} must have the size of its image, {shape}, but has {found} (height, width)')


def _check_labels(sample, num_classes: int, ignored: int) -> None:
    labels = sample.gt_sem_seg.data.numpy().astype(np.int64)
    present = np.flatnonzero(np.bincount(labels.ravel()))
    wrong = present[(present >= num_classes) & (present != ignored)]
    if wrong.size:
        reduced = ' after reduce_zero_label' if sample.get('reduce_zero_label') else ''
        raise ValueError(
            f'{sample.seg_map_path} must contain labels from 0 to {num_classes - 1}, or {ignored} for ignored pixels, '
            f'but contains {", ".join(map(str, wrong[:5]))}{reduced}'
        )
