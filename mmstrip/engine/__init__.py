from .checkpoint_hook import CompleteCheckpointHook
from .report_hook import ClassificationReportHook

__all__ = ['ClassificationReportHook', 'CompleteCheckpointHook']
