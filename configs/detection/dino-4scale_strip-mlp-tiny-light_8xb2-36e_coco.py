_base_ = ['./dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco.py']

param_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[30], gamma=0.1)]

train_cfg = dict(max_epochs=36)
