from .accelerate import AccelerateHook
from .bad_images import BadImagesHook
from .channels_last import ChannelsLastHook
from .checkpoint import SafeCheckpointHook
from .clock import ClockHook
from .complete_checkpoint import CompleteCheckpointHook
from .curves import TrainingCurvesHook
from .eta import TimeLeftHook
from .invalid_loss import InvalidLossHook
from .named_files import NamedFilesHook
from .pictures import PredictionPicturesHook
from .report import ClassificationReportHook
from .seed import SeedHook

__all__ = [
    'AccelerateHook',
    'BadImagesHook',
    'ChannelsLastHook',
    'ClassificationReportHook',
    'ClockHook',
    'CompleteCheckpointHook',
    'InvalidLossHook',
    'NamedFilesHook',
    'PredictionPicturesHook',
    'SafeCheckpointHook',
    'SeedHook',
    'TimeLeftHook',
    'TrainingCurvesHook',
]
