# Layer-wise learning-rate decay: each layer learns 0.8 times as fast as the one above it. The head can learn ten times
# as fast as without decay, while the first layers keep their ImageNet-1K features.
_base_ = ['./strip-mlp-tiny_in1k-pre_1xb64_cars.py']

optim_wrapper = dict(
    constructor='mmstrip.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
