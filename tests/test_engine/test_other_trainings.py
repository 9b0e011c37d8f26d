"""Trainings unlike the toolboxes' usual ones: other batches, wrappers, layers and constructors."""

import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.other_trainings import PlainModel
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from benchmarks.evidence.clock import ClockHook
from mmstrip.engine.launch import build_runner
from mmstrip.engine.precision import set_train_amp
from mmstrip.engine.runner import _compare_classes, runner_class
from mmstrip.utils.config import load_config
from mmstrip.utils.samples import image_files

PLAIN = """
custom_imports = dict(imports=['helpers.other_trainings'])
default_scope = 'mmengine'
model = dict(type='PlainModel')
train_dataloader = dict(
    batch_size=4,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='PlainDataset', count=8),
    collate_fn=dict(type='default_collate'),
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=1)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """What tools/train.py does with a config, and changes of it on the command line, in this process."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    handler = signal.getsignal(signal.SIGTERM)

    def call(text: str, amp: str | None = None, **options) -> Runner:
        (tmp_path / 'config.py').write_text(text)
        config = load_config(
            str(tmp_path / 'config.py'), {key.replace('__', '.'): value for key, value in options.items()}
        )
        config.work_dir, config.experiment_name = str(tmp_path / 'work'), tmp_path.name
        set_train_amp(config, amp)
        runner = build_runner(config)
        runner.train()
        return runner

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize('kind', ['dicts', 'pairs'])
def test_batches_without_data_samples(kind, train, tmp_path):
    assert train(PLAIN, train_dataloader__dataset__kind=kind).iter == 2
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()


def test_a_bad_loss_of_a_batch_without_data_samples(train):
    with pytest.raises(FloatingPointError, match=r'loss is inf at iteration 1 .* images of the batch: unknown\.'):
        train(PLAIN, model__scale=float('inf'))


def test_images_of_any_batch_are_named():
    one, two = (SimpleNamespace(img_path=name) for name in ('one.png', 'two.png'))
    assert list(image_files(dict(inputs=torch.zeros(2), data_samples=[one, two]))) == ['one.png', 'two.png']
    branches = dict(inputs=dict(sup=[torch.zeros(2)]), data_samples=dict(sup=[one], unsup_teacher=(two,)))
    assert list(image_files(branches)) == ['one.png', 'two.png']
    others = (torch.zeros(2), None, 'text', SimpleNamespace(img_path=None), [dict(inputs=3)])
    assert list(image_files(others)) == []


def test_the_clock_counts_the_images_of_all_branches():
    hook, hub = ClockHook(), SimpleNamespace(runtime_info={})
    hub.update_info, hub.get_info = hub.runtime_info.__setitem__, hub.runtime_info.__getitem__
    hook.before_train(SimpleNamespace(message_hub=hub))
    hook.before_train_epoch(None)
    for batch in (dict(inputs=torch.zeros(4, 3)), dict(inputs=dict(a=[0], b=[0, 0])), (torch.zeros(2, 3), None)):
        hook.after_train_iter(None, 0, batch)
    assert hook.clock['images'] == 4 + 3 + 2


def test_a_student_and_its_teacher_train(train):
    """As mmdet's SoftTeacher: batches are dicts of branches; in bfloat16, with layer-wise learning rates."""
    options = dict(
        model__type='StudentAndTeacher',
        train_dataloader__dataset__kind='branches',
        optim_wrapper__constructor='mmstrip.LayerDecayOptimWrapperConstructor',
        optim_wrapper__paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    runner = train(PLAIN, 'bfloat16', **options)
    assert runner.iter == 2
    groups = runner.optim_wrapper.optimizer.param_groups
    rates = {id(parameter): group['lr'] for group in groups for parameter in group['params']}
    student, teacher = runner.model.student, runner.model.teacher
    # One patch embedding, 4 blocks and what follows them.
    parts = (student.encoder.patch_embed, student.encoder.merging[0], student.encoder.merging[2], student.head)
    assert [rates[id(part.weight)] for part in parts] == pytest.approx([0.01 / 2**5, 0.01 / 2**3, 0.01 / 2, 0.01])
    assert not any(id(parameter) in rates for parameter in teacher.parameters())
    assert student.seen == {'encoder': torch.float32, 'patch_embed': torch.bfloat16}


def wrap(model: nn.Module, wrapper: dict | None, **config) -> nn.Module:
    """A model as a Runner of several processes without GPUs wraps it."""
    kind = runner_class()
    runner = kind.__new__(kind)
    runner._distributed, runner.cfg = True, Config(config)
    wrapped = runner.wrap_model(wrapper, model)
    assert dict(runner.cfg) == config
    return wrapped


@pytest.fixture
def group(one_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.mark.parametrize(
    'wrapper',
    [
        None,
        dict(find_unused_parameters=True),
        dict(type='MMDistributedDataParallel', device_ids=[0], output_device=0, broadcast_buffers=True),
        dict(type=nn.parallel.DistributedDataParallel, find_unused_parameters=True),
        dict(type='MMSeparateDistributedDataParallel'),
    ],
)
def test_any_wrapper_on_cpus(wrapper, group):
    model = PlainModel()
    if wrapper and 'Separate' in str(wrapper.get('type')):
        wrap(model, wrapper)
        assert type(model.encoder).__name__ == 'MMDistributedDataParallel'
        return
    wrapped = wrap(model, wrapper, find_unused_parameters=True)
    wrapped(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped.module is model
    assert wrapped.find_unused_parameters == (wrapper is None or wrapper.get('find_unused_parameters', False))


@pytest.mark.parametrize('sync_bn', [None, 'torch', 'mmcv'])
@pytest.mark.parametrize('norm', ['SyncBatchNorm', 'BatchNorm1d'])
def test_sync_bn_on_cpus(sync_bn, norm, group, monkeypatch):
    said = []
    monkeypatch.setattr('mmstrip.engine.runner.print_log', lambda words, **_: said.append(words))
    wrapped = wrap(PlainModel(norm), dict(find_unused_parameters=True), **({'sync_bn': sync_bn} if sync_bn else {}))
    wrapped(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
    assert not any('Sync' in type(layer).__name__ for layer in wrapped.modules())
    assert ['SyncBN is not available on CPUs' in words for words in said] == [True] * bool(sync_bn or 'Sync' in norm)


DROPS = (
    'gives no batch: with drop_last=True, 8 images per process do not fill batch_size=16. Lower batch_size, or set '
    'drop_last=False'
)
VALIDATION = """
val_dataloader = dict(train_dataloader, batch_size=16, drop_last=True)
val_cfg = dict()
val_evaluator = dict(type='DumpResults', out_file_path='none.pkl')
"""


@pytest.mark.parametrize(
    'more, options, words',
    [
        ('', dict(train_dataloader__batch_size=16, train_dataloader__drop_last=True), f'train_dataloader {DROPS}'),
        (
            'train_cfg = dict(by_epoch=False, max_iters=2)\n',
            dict(train_dataloader__batch_size=16, train_dataloader__drop_last=True),
            f'train_dataloader {DROPS}',
        ),
        ('', dict(train_dataloader__dataset__count=0), 'train_dataloader gives no batch: its dataset is empty'),
        (VALIDATION, {}, f'val_dataloader {DROPS}'),
    ],
)
def test_loaders_without_a_batch_are_refused(more, options, words, train, tmp_path):
    with pytest.raises(ValueError, match=f'^{words}$'):
        train(PLAIN + more, **options)
    assert not list(tmp_path.glob('work/*.pth'))


@pytest.mark.parametrize(
    'about, count, is_right',
    [
        (dict(classes=list('abc')), 3, True),
        (dict(classes=list('abc')), 2, False),
        (dict(classes=list('abc'), thing_classes=['a']), 1, True),
        (dict(classes=list('abc'), thing_classes=['a', 'b']), 1, False),
        ({}, 2, True),
        (None, 2, True),
    ],
)
def test_classes_without_an_output_are_said(about, count, is_right, monkeypatch):
    """Of a cascade, whose stages have heads of their own."""
    said = []
    monkeypatch.setattr('mmstrip.engine.runner.print_log', lambda words, **_: said.append(words))
    model = nn.Module()
    model.roi_head = nn.Module()
    model.roi_head.bbox_head = nn.ModuleList([nn.Module(), nn.Module()])
    model.roi_head.bbox_head[1].num_classes = count
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=about)))
    _compare_classes(loop, model)
    words = f'model.roi_head.bbox_head.num_classes is {count}, but train_dataloader.dataset has {count + 1} classes'
    assert said == ([] if is_right else [words])


def test_an_endless_sampler_fills_a_batch_from_fewer_images(train):
    more = 'train_cfg = dict(by_epoch=False, max_iters=1)\nlog_processor = dict(by_epoch=False)\n'
    more += "train_dataloader.update(sampler=dict(type='InfiniteSampler'), batch_size=16, drop_last=True)\n"
    assert train(PLAIN + more).iter == 1


def test_a_constructor_that_ignores_mixed_precision_is_refused(train):
    own = dict(optim_wrapper__constructor='DeafConstructor')
    words = "optim_wrapper.constructor 'DeafConstructor' built OptimWrapper, not BFloat16OptimWrapper, and would train"
    with pytest.raises(ValueError, match=words):
        train(PLAIN, 'bfloat16', **own)
    assert train(PLAIN, **own).iter == 2


SCALED = """
optim_wrapper.update(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.1))))
auto_scale_lr = dict(enable=True, base_batch_size=2)
custom_hooks = [dict(type='mmstrip.TrainingCurvesHook')]
"""


def test_the_curve_of_a_scaled_learning_rate(train, monkeypatch):
    drawn = {}
    monkeypatch.setattr('mmstrip.engine.hooks.curves.plot_curves', lambda panels, *_: drawn.update(panels))
    schedule = "param_scheduler = dict(type='LinearLR', start_factor=0.5, end=2, by_epoch=False)\n"
    runner = train(PLAIN + SCALED + schedule)
    _, rates = drawn['learning rate']['']
    assert list(rates) == pytest.approx([0.01, 0.02])  # 0.01 for 2 images, of which there are 4
    found = sorted({group['lr'] for group in runner.optim_wrapper.optimizer.param_groups})
    assert found == pytest.approx([0.002, 0.02])


def test_a_schedule_that_ignores_the_scaling_is_named(train, monkeypatch):
    said = []
    monkeypatch.setattr('mmstrip.engine.runner.print_log', lambda words, **_: said.append(words))
    schedule = "param_scheduler = dict(type='OneCycleLR', eta_max=0.01, total_steps=2, by_epoch=False)\n"
    train(PLAIN + SCALED + schedule)
    assert said == ['OneCycleLR takes its learning rate from eta_max, which --auto-scale-lr does not scale']


def test_a_runner_of_ones_own():
    assert issubclass(runner_class('FlexibleRunner'), runner_class('FlexibleRunner').__mro__[2])
    assert issubclass(runner_class(), Runner) and runner_class().__name__ == 'Runner'
    with pytest.raises(ValueError, match="runner_type: no Runner is registered as 'MyRunner'"):
        runner_class('MyRunner')
