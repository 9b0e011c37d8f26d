"""At home in the toolboxes: their functions, inferencers and tools take our configs, also inherited ones."""

import re
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import DATA, ROOT, blocks, run, table
from helpers.configs import build_model
from helpers.runs import call_tool, train_here
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, VISUALIZERS, init_default_scope
from PIL import Image

from mmstrip.analysis.complexity import TensorForward, data_samples
from mmstrip.converters.reparameterize import convert_to_deploy
from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.zoo import register_models

DIGITS = 'strip_mlp/strip-mlp-tiny-light_1xb64_digits-32px.py'
INHERITED = (
    DIGITS,
    'strip_mlp/strip-mlp-tiny_8xb128_in1k.py',
    'strip_mlp/strip-mlp-tiny_in1k-pre_1xb32_flowers102.py',
    'strip_mlp/strip-mlp-tiny_in1k-pre_1xb128_cifar10.py',
    'detection/mask-rcnn_strip-mlp-tiny_fpn_ms-crop-3x_coco.py',
    'detection/dino-4scale_strip-mlp-tiny_8xb2-12e_coco.py',
    'detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py',
    'segmentation/strip-mlp-tiny_upernet_8xb2-160k_ade20k-512x512.py',
    'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py',
)
# What a user's own file says; the tools of the toolboxes import no mmstrip before they read it.
OWN = """
_base_ = [__import__('mmstrip') and 'mmstrip::{name}']
train_cfg = dict(max_epochs=1)
default_hooks = dict(ema=dict(type='EMAHook', momentum=0.5))
"""
OWN_DIGITS = """
model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 1, 1))), head=dict(in_channels=128))
train_dataloader = dict(dataset=dict(indices=128))
"""
OWN_SCENES = """
train_dataloader = dict(dataset=dict(data_root={root!r}))
val_dataloader = test_dataloader = dict(dataset=dict(data_root={root!r}))
"""
EVALUATOR = "val_evaluator = test_evaluator = dict(ann_file={root!r} + '/annotations/val.json')\n"
OWN_CONFIGS = dict(
    mmpretrain=(DIGITS, OWN_DIGITS),
    mmdet=('detection/retinanet_strip-mlp-nano_fpn_1xb8_digit-scenes.py', OWN_SCENES + EVALUATOR),
    mmseg=('segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py', OWN_SCENES),
)


@pytest.mark.parametrize('name', INHERITED)
def test_all_parts_of_an_inherited_config_build(name, tmp_path):
    (tmp_path / 'mine.py').write_text(f"_base_ = ['mmstrip::{name}']\n")
    config = Config.fromfile(tmp_path / 'mine.py')
    build_model(config)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True, data_root=str(tmp_path)))
        assert dataset.pipeline.transforms
    Compose(config.get('train_pipeline') or config.train_dataloader.dataset.pipeline)
    for pipeline in (config.test_pipeline, config.get('tta_pipeline', [])):
        Compose(pipeline)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        if 'ann_file' not in evaluator:
            METRICS.build(evaluator)
        assert METRICS.get(f'{config.default_scope}.{evaluator.type}')
    VISUALIZERS.build(dict(config.visualizer, name=str(tmp_path)))
    for hook in [*config.default_hooks.values(), *config.custom_hooks]:
        HOOKS.build(hook)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'scenes'
    write_digit_scenes(folder, num_train=16, num_val=4)
    return folder


def write_config(path, toolbox, scenes):
    """A user's file that inherits the configs on digits."""
    name, more = OWN_CONFIGS[toolbox]
    path.write_text(OWN.format(name=name) + (more if toolbox == 'mmpretrain' else more.format(root=str(scenes))))
    return path


BROWSED = """
_base_ = ['mine.py']
visualizer = dict(_delete_=True, type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""
TESTED = '`train.py`, `test.py`, and `test.py` with `--tta`'
# Rows of the page's table of tools: command lines below a toolbox's tools.
ROWS = {
    '`print_config`, `get_flops`': dict(
        mmpretrain=['misc/print_config.py {config}', 'analysis_tools/get_flops.py {config} --shape 32'],
        mmdet=['misc/print_config.py {config}', 'analysis_tools/get_flops.py {config} --num-images 1'],
        mmseg=['misc/print_config.py {config}', 'analysis_tools/get_flops.py {config} --shape 64 64'],
    ),
    '`browse_dataset`': dict(
        mmpretrain=['visualization/browse_dataset.py {browsed} -m original -n 2 --not-show -o browsed'],
        mmdet=['analysis_tools/browse_dataset.py {config} --not-show --output-dir browsed'],
        mmseg=['analysis_tools/browse_dataset.py {config} --not-show --output-dir browsed'],
    ),
    '`confusion_matrix`': dict(
        mmpretrain=['analysis_tools/confusion_matrix.py {config} {checkpoint} --out matrix.pkl'],
        mmdet=['analysis_tools/confusion_matrix.py {config} {results} matrix'],
        mmseg=['analysis_tools/confusion_matrix.py {config} {results} matrix'],
    ),
    '`analyze_results`': dict(
        mmpretrain=['analysis_tools/analyze_results.py {config} {results} --out-dir analyzed --topk 1'],
        mmdet=['analysis_tools/analyze_results.py {config} {results} analyzed --topk 1'],
    ),
    '`vis_scheduler`': dict(mmpretrain=['visualization/vis_scheduler.py {config} --not-show -d 128 -s rates.png']),
}
# Tested below, and by hand: a tool of mim's, logs of longer trainings, photographs, a GPU.
OTHERS = {TESTED, '`mim train PACKAGE CONFIG`', '`analyze_logs`', 'Grad-CAM', '`benchmark`'}


def test_every_tool_of_the_page_is_run():
    assert {row[0] for row in table(ROOT / 'docs' / 'toolboxes.md', 'tool')} == {*ROWS, *OTHERS}


OPEN = dict(mmpretrain='get_model', mmdet='init_detector', mmseg='init_model')


@pytest.mark.parametrize('toolbox', OPEN)
def test_their_own_tools_take_inherited_configs(toolbox, scenes, tmp_path):
    """Those of the page's table; the models that their functions open then have the averaged weights."""
    config = write_config(tmp_path / 'mine.py', toolbox, scenes)
    tools = next(iter(import_module(toolbox).__path__)) + '/.mim/tools'
    work_dir = ['--work-dir', tmp_path / 'work']
    checkpoint = tmp_path / 'work' / 'epoch_1.pth'
    done = call_tool(f'{tools}/train.py', config, *work_dir, folder=tmp_path)
    assert done.returncode == 0 and checkpoint.is_file(), done.stdout
    assert re.search(r'Strip-MLP: (\d) of \1 blocks', done.stdout)
    results = tmp_path / ('results' if toolbox == 'mmseg' else 'results.pkl')  # a folder of label maps
    for options in (['--out', results], ['--tta']):
        done = call_tool(f'{tools}/test.py', config, checkpoint, *work_dir, *options, folder=tmp_path)
        assert done.returncode == 0, done.stdout
    (tmp_path / 'browse.py').write_text(BROWSED)
    words = dict(config=config, checkpoint=checkpoint, browsed=tmp_path / 'browse.py', results=results)
    for lines in ROWS.values():
        for line in lines.get(toolbox, []):
            tool, *arguments = (word.format(**words) for word in line.split())
            done = call_tool(f'{tools}/{tool}', *arguments, folder=tmp_path, cwd=tmp_path)
            assert done.returncode == 0, (line, done.stdout)
    weights = getattr(import_module(f'{toolbox}.apis'), OPEN[toolbox])(
        str(config), str(checkpoint), device='cpu'
    ).state_dict()
    saved = torch.load(checkpoint, weights_only=False)  # with the histories of mmengine's own Runner
    assert all(torch.equal(weights[key], saved['state_dict'][key]) for key in weights)
    assert not all(torch.equal(weights[key], saved['ema_state_dict'][f'module.{key}']) for key in weights)


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    """A folder of one picture."""
    path = tmp_path_factory.mktemp('pictures') / 'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(path)
    return path


def write_checkpoint(name, path, num_classes, deploy=False):
    """Of a model with random weights; a config for it."""
    config = Config.fromfile(ROOT / 'configs' / name)
    config.model.backbone.init_cfg = None
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    if deploy:
        model.backbone.switch_to_deploy()
        config.model.backbone.deploy = True
    meta = dict(classes=tuple(map(str, range(num_classes))), palette=[[i, 9 * i, 90] for i in range(num_classes)])
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), path)
    return config


@pytest.mark.parametrize('deploy', [False, True])
def test_classifiers_in_mmpretrain(deploy, image, tmp_path):
    from mmpretrain import FeatureExtractor, ImageClassificationInferencer

    config = write_checkpoint(DIGITS, tmp_path / 'weights.pth', 10, deploy)
    inferencer = ImageClassificationInferencer(config, pretrained=str(tmp_path / 'weights.pth'), device='cpu')
    results = inferencer([str(image), mmengine_image(image)], show_dir=str(tmp_path / 'shown'))
    assert results[0]['pred_class'] == results[1]['pred_class'] == str(results[0]['pred_label'])
    assert np.allclose(results[0]['pred_scores'], results[1]['pred_scores'])
    assert list((tmp_path / 'shown').iterdir())
    (feature,) = FeatureExtractor(config, pretrained=str(tmp_path / 'weights.pth'), device='cpu')(str(image))[0]
    assert feature.shape == (640,)


def test_averaged_weights_in_mmpretrain(image, tmp_path):
    """A checkpoint of EMAHook predicts as the average of the weights after each iteration, in deploy form too."""
    from mmpretrain import ImageClassificationInferencer

    every = dict(type='CheckpointHook', by_epoch=False, interval=1, max_keep_ckpts=-1)
    options = {'default_hooks.checkpoint': every, 'custom_hooks': [dict(type='EMAHook', momentum=0.5)]}
    train_here(tmp_path / 'work', options)
    first, *others = (torch.load(tmp_path / f'work/iter_{i}.pth', weights_only=True) for i in (1, 2, 3))
    average = {key: value.clone() for key, value in first['state_dict'].items()}
    for checkpoint in others:
        raw = {key: checkpoint['ema_state_dict'][f'module.{key}'] for key in average}
        average = {k: v.lerp(raw[k], 0.5) if v.is_floating_point() else raw[k] for k, v in average.items()}
    average.update({key: value for key, value in raw.items() if 'running' in key})  # BN statistics are the last ones
    saved = {name: tmp_path / f'{name}.pth' for name in ('average', 'raw', 'deploy')}
    for name, weights in (('average', average), ('raw', raw)):
        torch.save(dict(state_dict=weights, meta=first['meta']), saved[name])
    config = Config.fromfile(DATA / 'digits_tiny.py')
    convert_to_deploy(config.filename, str(tmp_path / 'work/iter_3.pth'), str(saved['deploy']))

    def predict(path):
        config.model.backbone.deploy = path == saved['deploy']
        return ImageClassificationInferencer(config, pretrained=str(path))(str(image))[0]['pred_scores']

    scores = predict(tmp_path / 'work/iter_3.pth')
    assert np.allclose(scores, predict(saved['average']), atol=1e-6)
    assert np.allclose(scores, predict(saved['deploy']), atol=1e-4)
    assert not np.allclose(scores, predict(saved['raw']), atol=1e-3)


def mmengine_image(path):
    """As the toolboxes' users hold images: an array in BGR."""
    return np.array(Image.open(path))[..., ::-1].copy()


def test_our_names_in_mmpretrain(image, tmp_path):
    from mmpretrain import get_model, inference_model, list_models

    register_models()
    register_models()
    assert 'strip-mlp-tiny_3rdparty_in1k' in list_models('strip-mlp')
    write_checkpoint(DIGITS, tmp_path / 'weights.pth', 10)
    model = get_model('strip-mlp-tiny-light_1xb64_digits-32px', pretrained=str(tmp_path / 'weights.pth'))
    result = inference_model(model, str(image))
    assert result['pred_class'] == str(result['pred_label'])
    backbone = get_model('strip-mlp-tiny-light_3rdparty_in1k', backbone=dict(out_indices=(0, 1, 2, 3))).backbone
    assert len(backbone(torch.rand(1, 3, 64, 64))) == 4


DENSE = dict(
    mmdet=('detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py', 10, 'inference_detector', 'DetInferencer'),
    mmseg=('segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py', 11, 'inference_model', 'MMSegInferencer'),
)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('toolbox', DENSE)
def test_functions_and_inferencers_of_mmdet_and_mmseg(toolbox, deploy, image, tmp_path):
    name, classes, infer, inferencer = DENSE[toolbox]
    apis = import_module(f'{toolbox}.apis')
    write_checkpoint(name, tmp_path / 'weights.pth', classes, deploy).dump(tmp_path / 'config.py')
    arguments = [str(tmp_path / 'config.py'), str(tmp_path / 'weights.pth')]
    found = []
    for inputs in (str(image), mmengine_image(image)):  # a model each: mmseg changes the pipeline of the model's config
        result = getattr(apis, infer)(getattr(apis, OPEN[toolbox])(*arguments, device='cpu'), inputs)
        found.append(result.pred_instances.masks if toolbox == 'mmdet' else result.pred_sem_seg.data)
    assert torch.equal(*found) and found[0].shape[1:] == (96, 128)
    inferencer = getattr(apis, inferencer)(*arguments, device='cpu')
    for inputs in (str(image), mmengine_image(image), str(image.parent)):
        predicted = inferencer(inputs, out_dir=str(tmp_path / 'out'))['predictions']
        if toolbox == 'mmdet':
            assert len(predicted[0]['bboxes']) == len(predicted[0]['masks']) == len(found[0])
        else:
            assert np.array_equal(np.squeeze(predicted), found[0][0].numpy())


def test_configs_are_read_where_mmstrip_was_not_imported(scenes, tmp_path):
    """As the toolboxes' tools read them."""
    inherited = write_config(tmp_path / 'mine.py', 'mmpretrain', scenes)
    code = f"""
import sys
from mmengine.config import Config
config = Config.fromfile({str(ROOT / 'configs/segmentation/strip-mlp-tiny_upernet_8xb2-160k_ade20k-512x512.py')!r})
print(config.model.type, 'mmstrip' in sys.modules)
print(Config.fromfile({str(inherited)!r}).model.type)
"""
    assert run(sys.executable, '-c', code, cwd=tmp_path).stdout == 'EncoderDecoder False\nImageClassifier\n'


OWN_MODELS = [block for block in blocks(ROOT / 'docs' / 'toolboxes.md', 'python') if 'mmstrip.StripMLP' in block]


@pytest.mark.parametrize('block', OWN_MODELS, ids=['classifier', 'detector', 'segmentor'])
def test_own_models_of_the_page(block, tmp_path):
    (tmp_path / 'mine.py').write_text(block)
    config = Config.fromfile(tmp_path / 'mine.py')
    init_default_scope(config.default_scope)
    config.model.backbone.pop('init_cfg', None)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        outputs = TensorForward(model, data_samples(model, (3, 64, 96)))(torch.rand(1, 3, 64, 96))
    assert outputs and all(torch.isfinite(output).all() for output in outputs)
