# Layer-wise learning rates: each layer below the head learns 0.8 times as fast as the one above it. So the top may
# learn ten times as fast as without it, while what ImageNet-1K has taught the first layers stays.
_base_ = ['./strip-mlp-tiny_in1k-pre_1xb64_cars.py']

optim_wrapper = dict(
    constructor='mmstrip.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
