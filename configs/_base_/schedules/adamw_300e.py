# The authors' recipe for ImageNet-1K and the small datasets: 300 epochs, of which 20 warm up from 5e-7, then cosine
# decay from 5e-4 to 5e-6. Their only published command uses one process with 128 images, and their learning rate does
# not depend on the batch size; 8 x 128 images on ImageNet-1K are our assumption.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999)),
    # No decay on biases and 1-D parameters; the authors' GRN parameters are 4-D, so they decay.
    paramwise_cfg=dict(bias_decay_mult=0.0, flat_decay_mult=0.0, custom_keys={'.grn.': dict(decay_mult=1.0)}),
    clip_grad=dict(max_norm=5.0),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=20, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)
