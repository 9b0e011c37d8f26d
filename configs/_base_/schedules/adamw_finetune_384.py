# Short fine-tuning at a larger image size, from a 224 px checkpoint on the same data.
_base_ = ['./adamw_finetune_30e.py']

optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))

auto_scale_lr = dict(base_batch_size=512)
