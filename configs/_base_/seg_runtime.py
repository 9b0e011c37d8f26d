# Segmentors, trained by iterations.
_base_ = ['./default_runtime.py']

default_scope = 'mmseg'

default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=8000, save_best='mIoU'),
    visualization=dict(_delete_=True, _scope_='mmseg', type='SegVisualizationHook'),
)

custom_hooks = [dict(type='SyncBuffersHook'), dict(type='mmstrip.TrainingCurvesHook')]

env_cfg = dict(cudnn_benchmark=False)  # image sizes vary

visualizer = dict(type='mmseg.SegLocalVisualizer', name='visualizer')
log_processor = dict(by_epoch=False)

tta_model = dict(_scope_='mmseg', type='SegTTAModel')
