_base_ = ['./ade20k_512x512.py']

crop_size = (512, 1024)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (2048, 1024)
train_pipeline[3].crop_size = crop_size

dataset = dict(type='CityscapesDataset', data_root='data/cityscapes/')
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'), pipeline=train_pipeline, **dataset
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'), pipeline=test_pipeline, **dataset
    )
)
test_dataloader = val_dataloader
