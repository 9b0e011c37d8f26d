from .accelerate import AccelerateHook
from .bad_images import BadImagesHook
from .channels_last import ChannelsLastHook
from .checkpoint import SafeCheckpointHook
from .checkpoint_fit import CheckpointFitHook
from .classification_pictures import ClassificationReportHook
from .curves import TrainingCurvesHook
from .eta import ETAHook
from .invalid_loss import InvalidLossHook
from .late_losses import LateLossesHook
from .pictures import PredictionPicturesHook
from .plain_checkpoint import PlainCheckpointHook
from .seed import SeedHook

__all__ = [
    'AccelerateHook',
    'BadImagesHook',
    'ChannelsLastHook',
    'CheckpointFitHook',
    'ClassificationReportHook',
    'ETAHook',
    'InvalidLossHook',
    'LateLossesHook',
    'PlainCheckpointHook',
    'PredictionPicturesHook',
    'SafeCheckpointHook',
    'SeedHook',
    'TrainingCurvesHook',
]
