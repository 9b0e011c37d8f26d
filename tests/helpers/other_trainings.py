"""Models, data and a constructor unlike the toolboxes', loaded by custom_imports."""

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn
from torch.utils.data import Dataset

from helpers import small_backbone

_TINY = dict(embed_dims=16, depths=(1, 1, 1, 1))


@DATASETS.register_module(force=True)
class PlainDataset(Dataset):
    """Random images with a label each: as dicts of tensors or as pairs; no metainfo, no data samples."""

    def __init__(self, count: int, pairs: bool = False):
        self.count = count
        self.pairs = pairs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        image, label = torch.randn(3, 32, 32), torch.tensor(index % 3)
        return (image, label) if self.pairs else dict(inputs=image, data_samples=label)


@MODELS.register_module(force=True)
class PlainModel(BaseModel):
    """A classifier whose ``data_samples`` is a tensor of labels, with SyncBN that no config names."""

    def __init__(self, norm: str = 'BatchNorm1d', scale: float = 1.0):
        super().__init__()
        self.encoder = small_backbone(arch=_TINY, img_size=32, drop_path_rate=0.0)
        self.norm = getattr(nn, norm)(128)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(128, 3)
        self.scale = scale

    def forward(self, inputs: Tensor, data_samples: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        scores = self.head(self.norm(self.encoder(inputs)[0].mean((2, 3))))
        return dict(loss=nn.functional.cross_entropy(scores, data_samples) * self.scale)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class DeafConstructor:
    """Builds an optimizer of its own, whatever the config says of its wrapper."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        pass

    def __call__(self, model: nn.Module) -> OptimWrapper:
        return OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
