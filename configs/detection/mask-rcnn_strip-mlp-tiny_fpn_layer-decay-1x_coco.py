# Layer-wise learning-rate decay: each layer of the backbone learns 0.8 times as fast as the one above it, neck and
# heads at twice the rate of the 1x recipe.
_base_ = ['./mask-rcnn_strip-mlp-tiny_fpn_1x_coco.py']

optim_wrapper = dict(
    constructor='mmstrip.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
