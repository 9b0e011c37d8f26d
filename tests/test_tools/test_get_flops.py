"""tools/analysis_tools/get_flops.py, on models of all three tasks."""

import re

import pytest
from helpers import DATA, ROOT, SMALL_CONFIG
from helpers.runs import run_here

TINY_CONFIG = DATA / 'digits_tiny.py'


@pytest.mark.parametrize(
    'config, options, words',
    [
        ('strip_mlp/strip-mlp-tiny_8xb128_in1k.py', ['224'], 'Params: 24.90 M (24,903,920)\nFLOPs:  3.66 G'),
        (SMALL_CONFIG, ['32', '64', '--table'], 'backbone.stages.2'),
        (SMALL_CONFIG, ['32', '64'], 'Input:  3 x 32 x 64'),
        # With proposals, with queries, and as the table of configs/segmentation rounds it.
        ('detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py', ['64', '96'], ''),
        ('detection/dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco.py', ['192', '320'], ''),
        ('segmentation/strip-mlp-tiny-light_fpn_8xb2-80k_ade20k-512x512.py', ['512'], 'FLOPs:  35.76 G'),
    ],
)
def test_flops_of_any_shape(config, options, words, capsys):
    run_here('analysis_tools/get_flops.py', ROOT / 'configs' / config, '--shape', *options)
    printed = capsys.readouterr().out
    assert words in printed and float(re.search(r'FLOPs: +([\d.]+) G', printed).group(1)) > 0


@pytest.mark.parametrize(
    'content, options, words',
    [
        ('model = (', [], 'config.py cannot be read as a config: SyntaxError: .*never closed'),
        ('a = 1', [], 'config.py has no model$'),
        (None, ['--cfg-options', 'model=3'], 'config.py: model must be a dict, but is 3$'),
        (None, ['--shape', '3'], r'the model fails on images \(3, 3, 3\): '),
        (None, ['--shape', '0'], r'must be positive, but got \(3, 0, 0\)'),
        (None, ['--cfg-options', 'model.type=Other'], 'Other cannot be built: Other is not in the '),
        (None, ['--cfg-options', 'model.backbone.depth=3'], "unexpected keyword argument 'depth'"),
        (
            None,
            ['--cfg-options', 'train_pipeline.9.type=Resize'],
            '--cfg-options do not fit .*config.py: Index 9 exceeds',
        ),
        (None, ['--cfg-options', 'depth:3'], "--cfg-options takes KEY=VALUE, but got 'depth:3'"),
        (None, ['--shape', '1', '2', '3'], '--shape takes one side or H W, but got 1 2 3'),
    ],
)
def test_wrong_input_is_an_error_in_one_sentence(content, options, words, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(content or f'_base_ = {str(TINY_CONFIG)!r}')
    with pytest.raises(SystemExit) as error:
        run_here('analysis_tools/get_flops.py', config, *options)
    assert re.search(words, f'{error.value} {capsys.readouterr().err}'.strip())
