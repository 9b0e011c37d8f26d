"""Pictures of predictions of detectors and segmentors."""

from pathlib import Path

import mmcv
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS


@HOOKS.register_module()
class PredictionPicturesHook(Hook):
    """Save pictures of a test's predictions beside the truth, drawn by the toolbox's own visualizer.

    mmdet and mmseg have hooks that do so too, one without an interval, the other into the log folder. With several
    processes, the first one draws its share of the images.

    Args:
        out_dir (str): Folder to write to; a picture is named as its image, numbered if that name is taken.
        interval (int): Draw every n-th image. Defaults to 1.
    """

    def __init__(self, out_dir: str, interval: int = 1):
        self.out_dir = Path(out_dir)
        self.interval = interval

    def before_test(self, runner: Runner) -> None:
        self.seen = 0
        self.names: set[str] = set()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        if not is_main_process():
            return
        for sample in outputs:
            if self.seen % self.interval == 0:
                image = mmcv.imread(sample.img_path, channel_order='rgb')
                name = self._free_name(Path(sample.img_path).stem)
                runner.visualizer.add_datasample(name, image, sample, out_file=str(self.out_dir / f'{name}.png'))
            self.seen += 1

    def _free_name(self, stem: str) -> str:
        name = stem if stem not in self.names else f'{stem}_{self.seen}'
        self.names.add(name)
        return name
