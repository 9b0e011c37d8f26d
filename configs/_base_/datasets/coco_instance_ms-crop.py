# COCO with short sides from 480 to 800, half of the images cropped first: DETR's augmentation, used in 3x recipes.
_base_ = ['./coco_instance.py']

resize = dict(type='RandomChoiceResize', scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                resize,
            ],
        ],
    ),
    dict(type='mmstrip.ToPlanes'),
    dict(type='PackDetInputs'),
]

# mmengine would give types without a scope that of an inheriting project; these are mmdet's.
for __step in train_pipeline:
    __step['_scope_'] = 'mmdet'

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
