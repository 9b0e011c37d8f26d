"""Exported files in int8, and tests of exported files by a config's metrics."""

import json
import re
import zipfile

import numpy as np
import onnx
import pytest
from helpers import last_line
from helpers.runs import CONFIG, call_tool, run_here
from mmengine.fileio import load as load_file
from onnx import numpy_helper

from mmstrip.deployment import load
from mmstrip.deployment.quantization import calibration_pixels, quantize
from mmstrip.deployment.testing import use_exported
from mmstrip.utils.config import load_config


def test_calibration_sees_training_images_as_tests_do():
    config = load_config(str(CONFIG))
    dataset = config.train_dataloader.dataset
    dataset.pipeline = [dict(type='RandomErasing', erase_prob=1.0, mode='const')]
    pixels = calibration_pixels(config, 8)
    assert len(pixels) == 8 and {(image.shape, image.dtype) for image in pixels} == {((3, 32, 32), np.dtype('uint8'))}
    np.testing.assert_array_equal(pixels[:4], calibration_pixels(config, 4))
    assert len(calibration_pixels(config, 100)) == 30  # all
    others = dict(dataset, indices=range(30, 50))
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset, others])
    together = calibration_pixels(config, 100)
    assert len(together) == 50 and len({image.tobytes() for image in together}) > 30


@pytest.mark.parametrize('name', ['classifier', 'classifier in openvino'])
def test_files_in_int8(name, exported, tmp_path, tmp_path_factory):
    source = exported(name)
    out, prints = tmp_path / f'int8{source.suffix}', tmp_path_factory.mktemp('prints')
    done = call_tool('deployment/quantize.py', source, CONFIG, out, '--images', '16', folder=prints)
    assert done.returncode == 0, done.stdout
    change = float(re.search(r'difference on calibration images: ([\d.]+)%', done.stdout)[1])
    assert 0.1 < change < 20
    before, after = load(source), load(out)
    assert after.about == {**before.about, 'int8': True}
    pixels = np.stack(calibration_pixels(load_config(str(CONFIG)), 30))
    (found,), (expected,) = after.run(pixels), before.run(pixels)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    if out.suffix == '.onnx':
        weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer]
        assert {weight.dtype for weight in weights if weight.ndim == 4} == {np.dtype('int8')}
        assert any(weight.dtype == np.float32 and weight.shape == (64,) for weight in weights)  # scales of channels
    with pytest.raises(ValueError, match='must have float32 weights, but has int8'):
        quantize(out, tmp_path / f'again{source.suffix}', list(pixels))
    assert sorted(file.stem for file in tmp_path.iterdir()) == ['int8'] * (1 + (out.suffix == '.xml'))


def test_exported_files_have_the_metrics_of_their_checkpoint(exported, tmp_path):
    folder, metrics, predictions = exported('classifier').parent, [], []
    for name in ('weights.pth', 'small.onnx'):
        out, work_dir = tmp_path / f'{name}.pkl', tmp_path / name
        done = call_tool('test.py', CONFIG, folder / name, '--out', out, '--work-dir', work_dir, folder=tmp_path)
        assert done.returncode == 0, done.stdout
        metrics += [json.loads(path.read_text()) for path in work_dir.glob('*/*.json')]
        predictions.append(np.stack([sample['pred_score'] for sample in load_file(out)]))
    assert metrics[0]['accuracy/top1'] == metrics[1]['accuracy/top1'] and len(metrics) == 2
    np.testing.assert_allclose(*predictions, atol=1e-5)
    done = call_tool('test.py', CONFIG, folder / 'small.onnx', '--tta', '--work-dir', tmp_path / 'tta', folder=tmp_path)
    assert last_line(done.stdout).endswith('--tta needs a checkpoint; exported files are tested without augmentation')
    config = load_config(str(CONFIG), dict(load_from='none.pth'))
    use_exported(config, folder / 'small.onnx', 'auto')
    assert config.load_from is None and config.model.dtype == 'float32'
    arguments = [CONFIG, folder / 'small.onnx', '--work-dir', tmp_path / 'many', '--launcher', 'pytorch']
    done = call_tool('test.py', *arguments, folder=tmp_path)
    assert '--launcher must be none for exported files' in last_line(done.stdout)


def test_what_cannot_be_quantized_or_tested_is_said(exported, tmp_path):
    done = call_tool('deployment/quantize.py', tmp_path / 'maps.pt2', CONFIG, tmp_path / 'out.pt2', folder=tmp_path)
    assert (
        last_line(done.stdout) == f'Error: only onnx and openvino files can be quantized, but got {tmp_path}/maps.pt2'
    )
    options = ['--cfg-options', 'train_dataloader.dataset.type=Foo']
    with pytest.raises(SystemExit, match='^Error: Foo is not in the mmpretrain::dataset registry'):
        run_here('deployment/quantize.py', 'model.onnx', CONFIG, tmp_path / 'out.onnx', *options)
    with zipfile.ZipFile(tmp_path / 'maps.pt2', 'w') as archive:
        about = dict(load(exported('classifier')).about, format='torch-export', task='backbone')
        archive.writestr('mmstrip.json', json.dumps(about))
    arguments = [CONFIG, tmp_path / 'maps.pt2', '--work-dir', tmp_path / 'test']
    done = call_tool('test.py', *arguments, folder=tmp_path)
    assert f'{tmp_path}/maps.pt2 runs code when it is opened' in last_line(done.stdout)
    done = call_tool('test.py', *arguments, '--trust-checkpoints', folder=tmp_path)
    assert f'the config tests a classifier, but {tmp_path}/maps.pt2 is a backbone' in done.stdout
