"""Models, data and a constructor unlike the toolboxes', loaded by custom_imports."""

from functools import partial

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
    """Random images with a label each, as 'dicts', 'pairs' or dicts of 'branches'; no metainfo, no data samples."""

    def __init__(self, count: int, kind: str = 'dicts'):
        self.count = count
        self.kind = kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        image, label = torch.randn(3, 32, 32), torch.tensor(index % 3)
        if self.kind == 'pairs':
            return image, label
        both = self.kind == 'branches'
        return dict(inputs=dict(sup=image, unsup=image) if both else image, data_samples=label)


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


@MODELS.register_module(force=True)
class StudentAndTeacher(BaseModel):
    """Two models in one, of which the teacher is not trained, for batches of branches."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = PlainModel(), PlainModel().requires_grad_(False)
        self.student.seen = {}
        for name, part in (('encoder', self.student.encoder), ('patch_embed', self.student.encoder.patch_embed)):
            part.register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, inputs, outputs) -> None:
        self.student.seen[name] = (outputs if isinstance(outputs, Tensor) else outputs[0]).dtype

    def forward(self, inputs: dict, data_samples: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        with torch.no_grad():
            self.teacher(inputs['unsup'], data_samples)
        return self.student(inputs['sup'], data_samples)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class DeafConstructor:
    """Builds an optimizer of its own, whatever the config says of its wrapper."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        pass

    def __call__(self, model: nn.Module) -> OptimWrapper:
        return OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
