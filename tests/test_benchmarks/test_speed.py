"""The benchmark: its tool, models, tables and pictures."""

import json

import pytest
import torch
from helpers import SMALL_CONFIG, last_line
from helpers.runs import CONFIG, call_tool
from PIL import Image

from benchmarks.speed.measuring import Candidate, Settings, peak_memory
from benchmarks.speed.rounds import run_benchmark
from benchmarks.speed.specs import Spec
from mmstrip.deployment import formats

BENCHMARK = 'benchmarks.speed'
STRIP = 'mmstrip.StripMLP:arch=tiny-light,img_size=32'


def test_benchmark_compares_and_saves(tmp_path):
    small = f'Strip={SMALL_CONFIG}'
    models = [small, f'{small}@reference', 'Mine=mmstrip.StripMLP:arch=tiny-light,img_size=32@deploy@channels_last']
    options = ['--modes', 'train', 'inference', '--shapes', '32', '48x64', '--rounds', '2', '--warmup', '1']
    done = call_tool(BENCHMARK, *models, *options, '--out', tmp_path / 'out', folder=tmp_path)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert len(report['results']) == 3 * 2 * 2
    labels = [result['label'] for result in report['results'][:3]]
    assert labels == ['Strip', 'Strip @reference', 'Mine @deploy @channels_last']
    assert all(label in done.stdout for label in labels)
    for result in report['results']:
        assert result['q1'] <= result['median'] <= result['q3'] and len(result['seconds']) == 2
        assert result['peak_mib'] > 0 and result['flops'] > 0
    by_label = {result['label']: result for result in report['results'] if result['mode'] == 'train'}
    assert by_label['Strip']['params'] == by_label['Strip @reference']['params']
    assert by_label['Strip']['peak_mib'] < by_label['Strip @reference']['peak_mib']
    for mode in ('inference', 'train'):
        assert len(Image.open(tmp_path / 'out' / f'benchmark_{mode}.png').convert('L').getcolors()) > 20


def test_forms_of_one_model_stand_side_by_side(tmp_path):
    """With values that are those of the modules, whatever computes them."""
    small = f'Small={CONFIG}'
    forms = ['', '@deploy@autocast', '@bfloat16', '@deploy@openvino', '@deploy@onnxruntime']
    forms += ['@deploy@onnxruntime@half', '@deploy@openvino@int8']
    forms += ['@deploy@openvino@bfloat16'] * torch.cpu._is_avx512_bf16_supported()
    models = [f'{small}{form}' for form in forms]
    options = ['--shapes', '32', '--batch', '2', '--rounds', '1', '--warmup', '0', '--out', tmp_path]
    done = call_tool(BENCHMARK, *models, *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    for form, result in zip(forms, report['results'], strict=True):
        lower = form.endswith(('autocast', 'bfloat16'))
        assert result['dtype'] == ('bfloat16' if lower else 'float32')
        least, most = (1e-2, 0.5) if 'int8' in form else (1e-4, 5e-2) if lower or 'half' in form else (0, 1e-4)
        assert least < result['difference'] < most
        assert (result['peak_mib'] is None) == ('openvino' in form or 'onnx' in form)
    assert set(report['ceiling_gflops']) == {'float32', 'bfloat16'}


def test_wrong_values_are_refused():
    candidate = Candidate(Spec.parse('mmpretrain.ResNet:depth=18@channels_last'), Settings(batch=1))
    assert candidate.difference((64, 64)) < 1e-5
    with torch.no_grad():
        candidate.model.layer4[1].conv2.weight.mul_(1.1)
    with pytest.raises(
        ValueError, match='ResNet-18 @channels_last: outputs differ by .* but rounding explains at most 1e-03'
    ):
        candidate.difference((64, 64))


@pytest.mark.parametrize(
    'forms, settings, words',
    [
        (
            '@openvino',
            dict(modes=('inference', 'train')),
            'openvino runs inference only, but the modes are inference, tr',
        ),
        ('@openvino', dict(device='cuda'), 'openvino is measured on CPUs only, but the device is cuda'),
        ('@onnxruntime@bfloat16', {}, 'onnxruntime does not compute in bfloat16 on CPUs'),
        ('@onnxruntime', dict(dtype='bfloat16'), 'onnxruntime does not compute in bfloat16 on CPUs'),
    ],
)
def test_runtimes_say_what_they_cannot_do(forms, settings, words):
    with pytest.raises(ValueError, match=words):
        Candidate(Spec.parse(STRIP + forms), Settings(**settings))


def test_runtimes_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(formats, 'find_spec', lambda name: None if name == 'openvino' else name)
    with pytest.raises(ValueError, match='openvino needs packages that are not installed: pip install openvino'):
        Candidate(Spec.parse(f'{STRIP}@openvino'), Settings())


def test_profile_names_modules(tmp_path):
    done = call_tool(
        BENCHMARK, STRIP, '--profile', '--modes', 'train', '--shapes', '32', '--batch', '2', folder=tmp_path
    )
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.split('\n') if '%' in line]
    assert len(rows) == 10 and any('channel_mixing' in row for row in rows) and any('(backward)' in row for row in rows)


@pytest.mark.parametrize(
    'model, words',
    [
        (f'{STRIP}@fast', 'onnxruntime, openvino, half, int8, reference, but got fast'),
        (f'{STRIP}@int8', 'half and int8 go with onnxruntime or openvino'),
        ('mmstrip.StripMLP:tiny', "KEY=VALUE, but got 'tiny'"),
        ('mmpretrain.ResNat:depth=18', "'mmpretrain.ResNat'"),
        ('mmpretrain.ResNet:depth=18@deploy', 'ResNet has no deploy form'),
    ],
)
def test_models_that_cannot_be(model, words):
    with pytest.raises(ValueError, match=words):
        Spec.parse(model).build()


def test_models_need_labels_of_their_own():
    with pytest.raises(ValueError, match='LABEL=MODEL'):
        run_benchmark([Spec.parse(STRIP), Spec.parse(STRIP)], Settings())


def test_benchmark_says_what_is_wrong(tmp_path):
    done = call_tool(BENCHMARK, 'nowhere.py', '--shapes', '32', '--rounds', '1', folder=tmp_path)
    assert done.returncode != 0 and last_line(done.stdout) == 'Error: no config at nowhere.py', done.stdout


def test_peak_memory_is_what_is_held_at_once():
    def step():
        first = torch.ones(2**18)  # 1 MiB
        second = first + 1
        del first
        return second * 2

    assert 2 * 2**20 <= peak_memory(step, 'cpu') < 2.1 * 2**20


def test_specs_are_read():
    spec = Spec.parse('Mine=mmpretrain.ResNet:depth=50,style=pytorch@compile')
    assert (spec.label, spec.source, spec.forms) == ('Mine @compile', 'mmpretrain.ResNet', ('compile',))
    assert spec.arguments == dict(depth=50, style='pytorch')
    assert Spec.parse('mmstrip.StripMLP:arch=tiny').label == 'StripMLP-tiny'
    assert Settings().shapes == ((224, 224),)
