"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): 70,000 photographs of clothes, 28 x 28 gray levels."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from mmpretrain.datasets import BaseDataset

from ..registry import DATASETS

PACKAGE = 'dataset-fashion-mnist'
PACKAGE_FOLDER = '/usr/share/datasets/fashion-mnist'
SIDE, MARGIN = 28, 2
NUM_HELD_OUT = 5000
# Of the unpacked files, because there are several ways to pack them.
SHA256 = {
    'train-images-idx3-ubyte': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels-idx1-ubyte': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images-idx3-ubyte': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
}
COUNTS = {'train': 60000, 't10k': 10000}
_HEADERS = {'images': 16, 'labels': 8}  # bytes
SPLITS = {
    'train': ('train', slice(None)),
    'train-part': ('train', slice(None, -NUM_HELD_OUT)),
    'held-out': ('train', slice(-NUM_HELD_OUT, None)),
    'test': ('t10k', slice(None)),
}


def unpack_fashion_mnist(source: str | Path, out: str | Path) -> dict[str, int]:
    """Check the four files of Fashion-MNIST and unpack them.

    Args:
        source: Folder of the files, as ``.gz`` or unpacked.
        out: Folder to write to.

    Returns:
        Number of images of 'train' and of 't10k', the test set.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or not the published one.
    """
    contents = {name: _read(Path(source), name) for name in SHA256}
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[name]:
            raise ValueError(
                f'{_find(Path(source), name)} is not the published file: its content has SHA-256 {found}, not '
                f'{SHA256[name]}'
            )
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (Path(out) / name).write_bytes(content)
    return COUNTS


def _find(source: Path, name: str) -> Path:
    """The file as ``.gz``, or unpacked if there is only that."""
    packed, unpacked = source / f'{name}.gz', source / name
    return unpacked if unpacked.is_file() and not packed.is_file() else packed


def _read(source: Path, name: str) -> bytes:
    file = _find(source, name)
    if not file.is_file():
        raise FileNotFoundError(
            f'no {file}: on Debian and Ubuntu, "apt-get install {PACKAGE}" puts the four files into {PACKAGE_FOLDER}; '
            'elsewhere, download them from github.com/zalandoresearch/fashion-mnist and pass their folder'
        )
    content = file.read_bytes()
    if file.suffix != '.gz':
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f'{file} is damaged ({error}): download it again') from error


@DATASETS.register_module()
class FashionMNIST(BaseDataset):
    """Fashion-MNIST with a black margin of 2 pixels, as (32, 32, 3) images in memory with ``gt_label``.

    Args:
        data_root (str): Folder written by ``tools/dataset_converters/fashion_mnist.py``.
        split (str): 'train' (60,000 images), 'test' (10,000), or, to choose settings, 'train-part' and 'held-out', the
            first 55,000 and the last 5,000 training images. Defaults to 'train'.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: ``split`` is none of these.
    """

    METAINFO = {
        'classes': (
            *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
            *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
        )
    }

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in SPLITS:
            raise ValueError(f'split must be one of {", ".join(SPLITS)}, but got {split!r}')
        self.split = split
        super().__init__(ann_file='', data_root=data_root, test_mode=split in ('test', 'held-out'), **kwargs)

    def load_data_list(self) -> list[dict]:
        part, members = SPLITS[self.split]
        images, labels = (
            np.frombuffer(self._content(f'{part}-{kind}'), np.uint8, offset=_HEADERS[kind[:6]])
            for kind in ('images-idx3-ubyte', 'labels-idx1-ubyte')
        )
        images = np.pad(images.reshape(-1, SIDE, SIDE), [(0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)])
        return [
            dict(img=np.repeat(images[i][:, :, None], 3, axis=2), gt_label=int(labels[i]), img_path=f'{part}_{i:05d}')
            for i in range(len(labels))[members]
        ]

    def _content(self, name: str) -> bytes:
        file = Path(self.data_root) / name
        if not file.is_file():
            raise FileNotFoundError(
                f'no {file}: write it with "python tools/dataset_converters/fashion_mnist.py {self.data_root}"'
            )
        return file.read_bytes()
