"""The report on a GPU: what becomes of steps that fail, hang or crash, and the tool on a CPU."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from helpers import ROOT, last_line
from helpers.runs import call_tool

from benchmarks.gpu import iterations, page, runner, speed

TOOL = 'benchmarks.gpu'


def bad(dry):
    raise ValueError('two is not three')


def crashes(dry):
    os.write(1, b'the kernel is out of memory')
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(dry):
    time.sleep(600)


def good(dry):
    return [dict(answer=42, dry=dry)]


STEPS = dict(bad=bad, crashes=crashes, hangs=hangs, partly=lambda dry: [{}, dict(error='no memory')], good=good)


@pytest.fixture
def steps(monkeypatch):
    """In processes without the imports of a new one."""
    steps = dict(STEPS)
    monkeypatch.setattr(runner, 'STEPS', steps)
    monkeypatch.setattr(runner, 'CONTEXT', multiprocessing.get_context('fork'))
    return steps


def test_steps_that_fail_hang_or_crash_are_named_and_the_others_run(steps, tmp_path):
    found = runner.run_steps(list(steps), tmp_path / 'out', minutes=1, dry=True, seconds=3)['steps']
    assert {name: runner.errors_of(step) for name, step in found.items()} == dict(
        bad=['ValueError: two is not three'],
        crashes=['its process ended with -9: the kernel is out of memory'],
        hangs=['it took more than 3 seconds'],
        partly=['no memory'],
        good=[],
    )
    assert found['good']['rows'] == [dict(answer=42, dry=True)] and found['good']['seconds'] < 3
    assert json.loads((tmp_path / 'out' / 'report.json').read_text())['steps'] == found


def test_a_step_that_the_minutes_cut_short_comes_first_the_next_time(steps, tmp_path, capsys):
    found = runner.run_steps(['good', 'hangs', 'bad'], tmp_path, minutes=0.02, dry=True)['steps']
    assert list(found) == ['good']
    assert last_line(capsys.readouterr().out) == 'No minutes left; the same command continues with hangs, bad'
    steps['good'] = bad  # it is done and not run again
    again = runner.run_steps(['good', 'bad'], tmp_path, minutes=1, dry=True)['steps']
    assert again['good'] == found['good'] and runner.errors_of(again['bad'])


def test_a_process_that_ends_before_its_step_begins(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, '_work', lambda *_: os._exit(3))
    found = runner.run_steps(['good'], tmp_path, minutes=1, dry=True)['steps']['good']
    assert runner.errors_of(found) == ['its process ended with 3: ']


def test_a_step_that_failed_is_run_again_after_the_others(steps, tmp_path, capsys):
    runner.run_steps(['bad'], tmp_path, minutes=1, dry=True)
    steps['bad'] = good
    capsys.readouterr()
    found = runner.run_steps(['bad', 'good'], tmp_path, minutes=1, dry=True)['steps']
    assert [line.partition(':')[0] for line in capsys.readouterr().out.splitlines()] == ['good', 'bad']
    assert not runner.errors_of(found['bad'])


def test_an_iteration_and_its_kernels():
    (found,) = iterations.measure('ResNet-50', 'eager', dry=True)
    assert found['batch'] == 2 and found['fastest'] <= found['ms'] <= found['slowest']
    assert found['images_per_second'] == pytest.approx(2e3 / found['ms'], abs=0.06)
    assert found['launches'] > 100 and {'kernel', 'calls', 'share'} == set(found['kernels'][0])
    shares = [kernel['share'] for kernel in found['kernels']]
    assert sorted(shares, reverse=True) == shares and 0 < sum(shares) <= 1.001


def test_all_forms_of_a_model_are_timed_and_those_that_fail_are_named(monkeypatch):
    rows = speed.inference('Strip-MLP-T', 1, dry=True)
    assert [row['model'] for row in rows] == ['Strip-MLP-T', 'Strip-MLP-T @deploy', 'Strip-MLP-T @reference']
    assert all(row['image'] == '64 x 64' and row['peak_mib'] >= 0 for row in rows), rows
    assert all(row['images_per_second'] == pytest.approx(2e3 / row['ms'], rel=0.01, abs=0.06) for row in rows)
    monkeypatch.setattr('benchmarks.speed.measuring.Candidate.difference', lambda *_: bad(True))
    (row,) = speed.measure([speed.spec('Strip-MLP-T', True)], ['inference'], 1, True)
    assert row['error'] == 'ValueError: two is not three' and 'ms' not in row


def test_dense_maps_and_training_are_timed():
    rows = speed.dense('Strip-MLP-T', dry=True)
    assert [row['mode'] for row in rows] == ['inference', 'train'] and not any('error' in row for row in rows)


def test_the_tool_writes_what_a_step_finds(tmp_path):
    pages = ['--pages', ROOT / 'docs' / 'gpu.md']
    done = call_tool(TOOL, '--dry-run', '--out', tmp_path / 'out', '--steps', 'right', *pages, folder=tmp_path)
    assert done.returncode == 1 and 'right: done, ' in done.stdout, done.stdout
    assert f'{pages[1]} takes figures of a GPU, but the report is of no GPU' in last_line(done.stdout)
    rows = json.loads((tmp_path / 'out' / 'report.json').read_text())['steps']['right']['rows']
    assert [row['way'] for row in rows] == ['float32', 'bfloat16', 'float16', 'deploy']
    assert f'| right | float32 | {rows[0]["maps"]:.3g} | {rows[0]["gradients"]:.3g} |' in done.stdout


def test_pages_take_the_tables_that_were_measured(tmp_path):
    shutil.copy(ROOT / 'docs' / 'gpu.md', tmp_path)
    kernels = [dict(kernel='gemm', calls=3, share=0.5)]
    rows = [dict(model='T', ms=1.2345, images_per_second=1234.5), dict(model='T @cudagraphs', error='a | b')]
    steps = {
        'inference-T': dict(seconds=1, rows=rows),
        'iteration-T': dict(seconds=1, rows=[dict(network='T', ms=2.0, kernels=kernels)]),
        'right': dict(seconds=1, rows=[dict(error='maps differ')]),
    }
    environment = dict(device='Card 1', driver='2', torch='3', commit='4')
    page.fill_measured(tmp_path / 'gpu.md', dict(dry=False, environment=environment, steps=steps))
    text = (tmp_path / 'gpu.md').read_text()
    table = '\n'.join(
        [
            '| step | model | ms | images per second | error |',
            '| --- | --- | --- | --- | --- |',
            '| inference-T | T | 1.23 | 1,234 |  |',
            '| inference-T | T @cudagraphs |  |  | a / b |',
        ]
    )
    assert f'<!-- gpu: inference -->\nCard 1, driver 2, torch 3, commit 4:\n\n{table}\n<!-- end -->' in text
    assert '| iteration-T | T | 2 |\n<!-- end -->' in text and '| iteration-T | gemm | 3 | 0.5 |\n<!-- end -->' in text
    assert '| right | maps differ |' in text
    assert '<!-- gpu: memory -->\n<!-- end -->' in text


def test_steps_begin_with_correctness_and_our_iteration():
    names = list(runner.STEPS)
    assert names[:3] == ['right', 'right-accelerated', 'iteration-Strip-MLP-T']
    assert [name.partition('-')[0] for name in names].index('inference') > names.index('iteration-ResNet-50-eager')


def test_the_tool_needs_a_gpu_unless_told_otherwise(tmp_path):
    done = call_tool(TOOL, folder=tmp_path)
    words = 'Error: no GPU is available to PyTorch; --dry-run tries the steps on the CPU'
    assert done.returncode == 1 and last_line(done.stdout) == words
