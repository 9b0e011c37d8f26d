default_scope = 'mmpretrain'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='auto'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # Native operators, on GPUs compiled (unless compile=False); turn it off with tools/train.py --no-accelerate.
    accelerate=dict(type='mmstrip.AccelerateHook'),
    # For pictures of predictions, use tools/test.py --show-dir.
    visualization=dict(_scope_='mmpretrain', type='VisualizationHook', enable=False),
)

custom_hooks = [
    # One set of BN statistics for all processes, which is validated and saved.
    dict(type='SyncBuffersHook'),
    # Training curves; a confusion matrix and a sheet of predictions, also after testing.
    dict(type='mmstrip.TrainingCurvesHook'),
    dict(type='mmstrip.ClassificationReportHook'),
]

env_cfg = dict(
    cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl')
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='mmpretrain.UniversalVisualizer', vis_backends=vis_backends)

log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
