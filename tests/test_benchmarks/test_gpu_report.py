"""The report on a GPU: what becomes of steps that fail, hang or die, and the tool on a CPU."""

import json
import shutil

import pytest
from helpers import ROOT, last_line, python
from helpers.runs import call_tool

from benchmarks.gpu.page import fill_page, table_of

TOOL = 'benchmarks.gpu'
PART = 'helpers.gpu_steps'
RUN = f"""
import os
from benchmarks.gpu.steps import Setting, run_part
run_part({PART!r}, Setting(os.getcwd(), 'cpu', True, step_seconds=3))
"""


def test_steps_that_fail_hang_or_die_are_named_and_the_others_go_on(tmp_path):
    env = dict(PYTHONPATH=f'{ROOT}:{ROOT / "tests"}:{tmp_path}', OMP_NUM_THREADS='1')
    done = python(RUN, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    left = {name: json.loads((tmp_path / PART / f'{name}.json').read_text()) for name in NAMES}
    assert {name: one['state'] for name, one in left.items()} == dict(zip(NAMES, STATES)), done.stdout
    assert left['good']['result'] == left['last']['result'] == dict(answer=42)
    assert left['bad']['error'] == 'ValueError: two is not three'
    assert left['dies']['error'] == 'its process ended with -9: ' + left['dies']['error'].partition(': ')[2]
    assert 'the kernel is out of memory' in left['dies']['error']
    assert left['hangs']['error'] == 'it took more than 3 seconds'
    assert left['cannot']['reason'] == 'there is no such thing here'
    assert left['good']['environment']['device'].startswith('no GPU: ')


NAMES = ('good', 'bad', 'dies', 'hangs', 'cannot', 'last')
STATES = ('done', 'failed', 'failed', 'failed', 'not run', 'done')


def test_the_tool_measures_and_goes_on(tmp_path):
    options = ['--device', 'cpu', '--tiny', '--out', tmp_path / 'out', '--parts', 'fast']
    steps = ['--steps', 'eager-inference-float32-1', 'implementations', 'memory', 'graphs-train-Strip*']
    done = call_tool(TOOL, *options, *steps, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    page = (tmp_path / 'out' / 'report.md').read_text()
    assert 'These figures are of a CPU' in page and 'no figure here means anything' in page
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    left = report['parts']['fast']
    assert {name for name, one in left.items() if one['state'] == 'done'} == set(steps[1:4])
    assert left['graphs-train-Strip-MLP-T']['reason'] == 'CUDA graphs need CUDA'
    labels = {result['label'] for result in left[steps[1]]['result']['results']}
    assert labels == {'Strip-MLP-T', 'Strip-MLP-T @deploy', 'ResNet-18', 'ResNet-18 @channels_last'}
    assert all(label in page for label in labels)
    assert '[fast] memory: done' in (tmp_path / 'out' / 'fast' / 'log.txt').read_text()
    again = call_tool(TOOL, *options, *steps[:4], folder=tmp_path)  # of which nothing is left to do
    assert again.returncode == 0 and (tmp_path / 'out' / 'fast' / 'log.txt').read_text().count('memory: done') == 1


def test_pages_take_figures_of_gpus_alone(tmp_path):
    page = tmp_path / 'gpu.md'
    shutil.copy(ROOT / 'docs' / 'gpu.md', page)
    row = dict(model='T', checkpointing=False, shape=[224, 224], batch=64, peak_mib=1234.5, weights_mib=95.0)
    left = dict(state='done', result=dict(rows=[row, {**row, 'batch': 256, 'peak_mib': 'too much'}]))
    report = dict(tiny=False, device='cpu', environment=dict(device='no GPU: CPU'), parts=dict(fast=dict(memory=left)))
    with pytest.raises(ValueError, match='takes figures of a GPU, but the report is of no GPU: CPU'):
        fill_page(page, report)
    fill_page(page, {**report, 'device': 'cuda', 'environment': dict(device='Card 1')})
    table = table_of(left['result']['rows'])
    assert f'Card 1:\n\n{table}\n<!-- end -->' in page.read_text()
    assert '| T | False | 224 x 224 | 256 | too much | 95 |' in table


def test_the_tool_needs_a_gpu_unless_told_otherwise(tmp_path):
    done = call_tool(TOOL, folder=tmp_path)
    words = 'Error: --device cuda needs a GPU, and PyTorch sees none; --device cpu --tiny tries the steps'
    assert done.returncode == 1 and last_line(done.stdout) == words
