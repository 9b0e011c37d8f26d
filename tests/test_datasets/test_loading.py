"""Image files that cannot be read: the error names the file, whatever is wrong with it."""

import numpy as np
import pytest
from helpers import ROOT
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch.utils.data import Subset

from mmstrip.utils.samples import count_images, read_sample


@pytest.fixture(params=['cv2', 'pillow'])
def dataset(tmp_path, request):
    """Of one image, good.png."""
    (tmp_path / 'cat').mkdir()
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / 'cat' / 'good.png')
    init_default_scope('mmpretrain')
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
    pipeline = config.train_dataloader.dataset.pipeline
    pipeline[0].imdecode_backend = request.param
    return DATASETS.build(dict(type='CustomDataset', data_root=str(tmp_path), pipeline=pipeline))


@pytest.mark.parametrize('content', [b'', b'not an image', b'\xff\xd8\xff\xe0 broken'])
def test_content(content, dataset, tmp_path):
    assert read_sample(dataset, 0)['inputs'].shape == (3, 224, 224)
    (tmp_path / 'cat' / 'good.png').write_bytes(content)
    with pytest.raises(ValueError, match='good.png is not a readable image: .'):
        read_sample(dataset, 0)


def test_missing(dataset, tmp_path):
    (tmp_path / 'cat' / 'good.png').unlink()
    with pytest.raises(FileNotFoundError, match='no image file at .*good.png'):
        read_sample(dataset, 0)


def test_other_errors_stay_as_they_are(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'pipeline', lambda info: info['no_such_key'])
    with pytest.raises(KeyError, match='no_such_key'):
        read_sample(dataset, 0)
    (tmp_path / 'volume.npy').write_bytes(b'of a transform of others')
    monkeypatch.setattr(dataset, 'get_data_info', lambda index: dict(img_path=str(tmp_path / 'volume.npy')))
    with pytest.raises(KeyError, match='no_such_key'):
        read_sample(dataset, 0)
    with pytest.raises(ZeroDivisionError):
        read_sample(_Broken(), 0)


def test_repeated_images_count_once(dataset):
    repeated = RepeatDataset(dataset, 5)  # of one image
    assert len(repeated) == 5 and count_images(repeated) == count_images(Subset(repeated, [0, 3])) == 1
    assert count_images(ConcatDataset([dataset, dataset])) == 2 and count_images(Subset([1, 2, 3], [0, 1])) == 2


class _Broken:
    def __getitem__(self, index):
        return index / 0
