"""tools/analysis_tools/get_flops.py, on models of all three tasks."""

import re

from helpers import ROOT, SMALL_CONFIG
from helpers.runs import call_tool


def test_flops_of_any_shape(tmp_path):
    config = ROOT / 'configs/strip_mlp/strip-mlp-tiny_8xb128_in1k.py'
    done = call_tool('analysis_tools/get_flops.py', config, '--shape', '224', folder=tmp_path)
    assert 'Params: 24.90 M (24,903,920)' in done.stdout and 'FLOPs:  3.66 G' in done.stdout
    done = call_tool('analysis_tools/get_flops.py', SMALL_CONFIG, '--shape', '32', '64', '--table', folder=tmp_path)
    assert 'Input:  3 x 32 x 64' in done.stdout and 'backbone.stages.2' in done.stdout


def test_flops_of_detectors_and_segmentors(tmp_path):
    """With proposals, with queries, and as the table of configs/segmentation has it."""
    for name, shape, flops in (
        ('detection/mask-rcnn_strip-mlp-nano_fpn_1xb8_digit-scenes.py', ('64', '96'), None),
        ('detection/dino-4scale_strip-mlp-tiny-light_8xb2-12e_coco.py', ('192', '320'), None),
        ('segmentation/strip-mlp-tiny-light_fpn_8xb2-80k_ade20k-512x512.py', ('512',), 36),
    ):
        done = call_tool('analysis_tools/get_flops.py', ROOT / 'configs' / name, '--shape', *shape, folder=tmp_path)
        assert done.returncode == 0, done.stdout
        counted = float(re.search(r'FLOPs: +([\d.]+) G', done.stdout).group(1))
        assert counted > 0.1 if flops is None else round(counted) == flops
