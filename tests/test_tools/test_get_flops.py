"""tools/analysis_tools/get_flops.py, on models of all three tasks."""

import re

import pytest
from helpers import ROOT, SMALL_CONFIG
from helpers.runs import run_here


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
