"""Fashion-MNIST: files that are wrong are named, and those that are right are read."""

import gzip

import numpy as np
import pytest
from helpers.runs import run_here
from mmengine.registry import DATASETS, init_default_scope

from mmstrip.datasets.fashion_mnist import NUM_HELD_OUT, SHA256, unpack_fashion_mnist


def idx(kind, count, seed=0):
    """A file in the format of the data set, of random content."""
    shape = (count, 28, 28) if kind == 'images' else (count,)
    content = np.random.default_rng(seed).integers(0, 10, shape, dtype=np.uint8).tobytes()
    sizes = b''.join(size.to_bytes(4, 'big') for size in shape)
    return bytes([0, 0, 8, len(shape)]) + sizes + content


@pytest.fixture
def files(tmp_path):
    for name in SHA256:
        (tmp_path / f'{name}.gz').write_bytes(gzip.compress(idx(name.split('-')[1], 50)))
    return tmp_path


def test_missing_files_say_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match='^Error: no .*apt-get install dataset-fashion-mnist'):
        run_here('dataset_converters/fashion_mnist.py', tmp_path / 'out', '--source', tmp_path)


def test_files_that_are_not_the_published_ones(files, tmp_path):
    with pytest.raises(ValueError, match=r'train-images-idx3-ubyte.gz is not the published file: .*SHA-256'):
        unpack_fashion_mnist(files, tmp_path / 'out')
    packed = files / 'train-images-idx3-ubyte.gz'
    content = packed.read_bytes()
    for damaged in (content[:-20], b'no' + content, content[:12] + bytes([255] * 20) + content[32:]):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'train-images-idx3-ubyte.gz is damaged'):
            unpack_fashion_mnist(files, tmp_path / 'out')
    packed.unlink()
    (files / 'train-images-idx3-ubyte').write_bytes(b'other')
    with pytest.raises(ValueError, match=r'train-images-idx3-ubyte is not the published file'):
        unpack_fashion_mnist(files, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_dataset_reads_what_is_unpacked(tmp_path):
    init_default_scope('mmpretrain')
    images = idx('images', NUM_HELD_OUT + 10)
    (tmp_path / 'train-images-idx3-ubyte').write_bytes(images)
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(idx('labels', NUM_HELD_OUT + 10))
    part, held_out = (
        DATASETS.build(dict(type='mmstrip.FashionMNIST', data_root=str(tmp_path), split=split, pipeline=[]))
        for split in ('train-part', 'held-out')
    )
    assert (len(part), len(held_out)) == (10, NUM_HELD_OUT)
    image = part[1]['img']
    assert image.shape == (32, 32, 3) and not image[:2].any() and not image[:, -2:].any()
    np.testing.assert_array_equal(
        image[2:30, 2:30, 0].ravel(), np.frombuffer(images[16 + 784 : 16 + 2 * 784], np.uint8)
    )
    with pytest.raises(ValueError, match="split must be one of train, .*, but got 'val'"):
        DATASETS.build(dict(type='mmstrip.FashionMNIST', data_root=str(tmp_path), split='val'))
    with pytest.raises(FileNotFoundError, match='fashion_mnist.py'):
        DATASETS.build(dict(type='mmstrip.FashionMNIST', data_root=str(tmp_path), split='test'))
