"""Images in planes are the same images, which packing need not copy."""

import numpy as np
import pytest
import torch
from mmdet.datasets.transforms import PackDetInputs
from mmpretrain.datasets import PackInputs
from mmseg.datasets.transforms import PackSegInputs

from mmstrip.datasets import ToPlanes

IMG = np.random.default_rng(0).integers(0, 256, (19, 14, 3), dtype=np.uint8)
VIEWS = dict(
    whole=IMG,
    crop=IMG[3:17, 2:9],
    horizontal=np.flip(IMG, 1),
    vertical=np.flip(IMG, 0),
    both=np.flip(IMG, (0, 1)),
    rgb=IMG[..., ::-1],
    planes=IMG.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    column=np.flip(IMG[:, :1], 1),
    pixel=IMG[:1, :1],
)


@pytest.mark.parametrize('pack', [PackInputs, PackDetInputs, PackSegInputs])
@pytest.mark.parametrize('img', VIEWS.values(), ids=VIEWS)
def test_packed_images_are_the_same_and_not_copied(img, pack):
    before = img.copy()
    planes = ToPlanes()(dict(img=img))['img']
    assert planes.dtype == np.uint8
    np.testing.assert_array_equal(planes, before)
    np.testing.assert_array_equal(img, before)
    given = dict(img_id=1, img_path='a.jpg', ori_shape=img.shape[:2], img_shape=img.shape[:2])
    pack = pack(meta_keys=tuple(given))
    packed = pack(dict(given, img=planes))['inputs']
    torch.testing.assert_close(packed, pack(dict(given, img=img))['inputs'], rtol=0, atol=0)
    assert img.size == 3 or packed.data_ptr() == planes.ctypes.data


@pytest.mark.parametrize('img', [IMG.astype(np.float32), IMG[..., 0], IMG[..., :1], IMG[:0], np.dstack([IMG, IMG])])
def test_other_images_stay(img):
    assert ToPlanes()(dict(img=img))['img'] is img
