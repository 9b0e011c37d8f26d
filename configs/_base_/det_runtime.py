# Detectors.
_base_ = ['./default_runtime.py']

default_scope = 'mmdet'

default_hooks = dict(
    logger=dict(interval=50), visualization=dict(_delete_=True, _scope_='mmdet', type='DetVisualizationHook')
)

curves = ['coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50']
custom_hooks = [dict(type='SyncBuffersHook'), dict(type='mmstrip.TrainingCurvesHook', metrics=curves)]

env_cfg = dict(cudnn_benchmark=False)  # image sizes vary

visualizer = dict(type='mmdet.DetLocalVisualizer', name='visualizer')  # mmdet's browse_dataset needs a name
