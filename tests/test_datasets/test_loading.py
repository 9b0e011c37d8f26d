"""Image files that cannot be read: the error names the file, whatever is wrong with it."""

import numpy as np
import pytest
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmstrip.datasets import LoadImage


@pytest.mark.parametrize('content', [b'', b'not an image', b'\xff\xd8\xff\xe0 broken'])
def test_content(content, tmp_path):
    path = tmp_path / 'broken.jpg'
    path.write_bytes(content)
    for backend in ('cv2', 'pillow'):
        with pytest.raises(ValueError, match='broken.jpg is not a readable image'):
            LoadImage(imdecode_backend=backend)(dict(img_path=str(path)))


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='no image file at .*gone.jpg'):
        LoadImage()(dict(img_path=str(tmp_path / 'gone.jpg')))


def test_inside_a_dataset(tmp_path):
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'cat' / 'bad.jpg').write_bytes(b'nothing')
    init_default_scope('mmpretrain')
    config = Config.fromfile(ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py')
    dataset = DATASETS.build(
        dict(type='CustomDataset', data_root=str(tmp_path), pipeline=config.train_dataloader.dataset.pipeline)
    )
    with pytest.raises(ValueError, match='bad.jpg is not a readable image'):
        dataset[0]


def test_good_images_load(tmp_path):
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / 'good.png')
    results = LoadImage()(dict(img_path=str(tmp_path / 'good.png')))
    assert results['img'].shape == (5, 7, 3) and results['ori_shape'] == (5, 7)
