from .report_hook import ClassificationReportHook

__all__ = ['ClassificationReportHook']
