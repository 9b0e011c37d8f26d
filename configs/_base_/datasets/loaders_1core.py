# Training on one CPU core: the training process reads the images.
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,  # which mmpretrain's own tool would set
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_dataloader = dict(
    batch_size=100, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False)
)
val_evaluator = dict(_scope_='mmpretrain', type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
