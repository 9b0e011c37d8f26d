from .checkpoint_hook import CompleteCheckpointHook, SafeCheckpointHook
from .curves_hook import TrainingCurvesHook
from .data_hooks import BadImagesHook, InvalidLossHook
from .loops import ResumableEpochLoop, ResumableIterLoop
from .pictures_hook import PredictionPicturesHook
from .report_hook import ClassificationReportHook
from .seed_hook import SeedHook
from .time_left_hook import TimeLeftHook

__all__ = [
    'BadImagesHook',
    'ClassificationReportHook',
    'CompleteCheckpointHook',
    'InvalidLossHook',
    'PredictionPicturesHook',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'SafeCheckpointHook',
    'SeedHook',
    'TimeLeftHook',
    'TrainingCurvesHook',
]
