"""Run in several processes, or alone: gradients and metrics of this number of processes, written by the first one.

rank_checks.py SCENES OUT
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from helpers import ROOT, randomise, small_backbone
from mmstrip.engine.launch import leave_group
from mmstrip.utils.config import load_config

DENSE = {
    'detection': 'detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py',
    'segmentation': 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py',
}


def gradients() -> dict[str, torch.Tensor]:
    """Of the mean loss over a batch of 4, of which each process has its share; BN with fixed statistics."""
    torch.manual_seed(0)
    model = randomise(small_backbone(drop_path_rate=0.0)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, targets = torch.randn(4, 3, 64, 64), torch.randn(4)
    share = slice(get_rank(), None, get_world_size())
    whole = MMDistributedDataParallel(model) if get_world_size() > 1 else model
    loss = (whole(images[share])[0].mean(dim=(1, 2, 3)) - targets[share]).square().mean()
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def metrics(task: str, scenes: str) -> dict[str, float]:
    """Of predictions made from the truth, better for some images than for others."""
    config = load_config(str(ROOT / 'configs' / DENSE[task]))
    init_default_scope(config.default_scope)
    config.test_dataloader.dataset.data_root = scenes
    config.test_dataloader.batch_size = 2
    evaluators = config.test_evaluator
    if 'ann_file' in evaluators:
        evaluators.ann_file = f'{scenes}/annotations/val.json'
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    evaluator = Evaluator(evaluators)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        for sample in batch['data_samples']:
            draw = np.random.default_rng(int(sample.get('img_id', 0)) or len(sample.img_path))
            if task == 'detection':
                boxes = sample.gt_instances.bboxes.tensor
                noise = torch.from_numpy(draw.normal(0, 4, boxes.shape)).float()
                scores = torch.from_numpy(draw.random(len(boxes))).float()
                labels = sample.gt_instances.labels
                sample.pred_instances = InstanceData(bboxes=boxes + noise, scores=scores, labels=labels)
            else:
                truth = sample.gt_sem_seg.data
                wrong = torch.from_numpy(draw.random(truth.shape)) < 0.3
                sample.pred_sem_seg = PixelData(data=torch.where(wrong, (truth + 1) % 11, truth))
        evaluator.process(batch['data_samples'], batch)
    return evaluator.evaluate(len(loader.dataset))


def accuracy() -> dict[str, float]:
    """Of wrong labels for every third of 359 digits."""
    config = load_config(str(ROOT / 'tests/data/digits_small.py'))
    init_default_scope('mmpretrain')
    config.test_dataloader.dataset.indices = 359
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    evaluator = Evaluator(dict(type='Accuracy', topk=(1,)))
    for batch in loader:
        for sample in batch['data_samples']:
            wrong = int(Path(sample.img_path).stem[-4:]) % 3 == 0
            sample.set_pred_score(torch.eye(10)[(int(sample.gt_label) + wrong) % 10])
        evaluator.process(batch['data_samples'])
    return evaluator.evaluate(len(loader.dataset))


def main(scenes: str, out: str) -> None:
    if 'WORLD_SIZE' in os.environ:
        torch.distributed.init_process_group('gloo')
    results = dict(gradients=gradients(), accuracy=accuracy())
    for task in DENSE:
        results[task] = metrics(task, scenes)
    if is_main_process():
        torch.save(results, out)
    leave_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
