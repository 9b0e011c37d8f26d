# AdamW for detectors and segmentors; no decay on norms, biases and position tables.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            'position_row.table': dict(decay_mult=0.0),
            'position_column.table': dict(decay_mult=0.0),
        },
    ),
)
