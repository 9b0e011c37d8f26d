from .checkpoint_hook import CompleteCheckpointHook
from .curves_hook import TrainingCurvesHook
from .pictures_hook import PredictionPicturesHook
from .report_hook import ClassificationReportHook

__all__ = ['ClassificationReportHook', 'CompleteCheckpointHook', 'PredictionPicturesHook', 'TrainingCurvesHook']
