"""The report on a GPU: what becomes of steps that fail, hang or die, and the tool on a CPU."""

import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
from helpers import ROOT, last_line
from helpers.runs import call_tool

from benchmarks.gpu import Setting, iterations, page, runner

TOOL = 'benchmarks.gpu'


def bad(setting):
    raise ValueError('two is not three')


def dies(setting):
    os.write(1, b'the kernel is out of memory')
    os.kill(os.getpid(), signal.SIGKILL)


STEPS = dict(
    bad=bad,
    dies=dies,
    hangs=lambda setting: time.sleep(600),
    good=lambda setting: dict(answer=42, device=setting.device),
)


class Forked:
    """In place of subprocess: a step's process, without the imports of a new one."""

    STDOUT, TimeoutExpired = subprocess.STDOUT, subprocess.TimeoutExpired

    def __init__(self, command, stdout, **options):
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for file in (1, 2):
                os.dup2(stdout.fileno(), file)
            runner.work(command[3], Setting(**json.loads(command[4])), runner.Path(command[5]), STEPS)
            os._exit(0)
        self.returncode = None

    @classmethod
    def Popen(cls, *args, **options):  # noqa: N802
        return cls(*args, **options)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise self.TimeoutExpired('step', seconds)
            time.sleep(0.01)


def test_steps_that_fail_hang_or_die_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'subprocess', Forked)
    run = partial(runner.run_steps, list(STEPS), Setting(str(tmp_path / 'out'), 'cpu'), seconds=3)
    steps = run(minutes=1)['steps']
    assert {name: one['state'] for name, one in steps.items()} == dict.fromkeys(STEPS, 'failed') | dict(good='done')
    assert steps['bad']['why'] == 'ValueError: two is not three'
    assert steps['dies']['why'] == 'its process ended with -9: the kernel is out of memory'
    assert steps['hangs']['why'] == 'it took more than 3 seconds'
    assert steps['good']['result'] == dict(answer=42, device='cpu')
    assert json.loads((tmp_path / 'out' / 'report.json').read_text())['steps'] == steps


def test_a_step_that_the_minutes_cut_short_comes_first_the_next_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, 'subprocess', Forked)
    run = partial(runner.run_steps, setting=Setting(str(tmp_path), 'cpu'))
    steps = run(['good', 'hangs', 'bad'], minutes=0.02)['steps']
    assert list(steps) == ['good']
    assert last_line(capsys.readouterr().out) == 'No minutes left; the same command goes on with hangs, bad'
    STEPS['good'] = bad  # it has its result and is not run again
    assert run(['good', 'bad'], minutes=1)['steps']['good'] == steps['good']


def test_an_iteration_and_its_kernels():
    found = iterations.measure('ResNet-50', 'eager', Setting('', 'cpu', tiny=True))
    assert found['batch'] == 2 and found['fastest'] <= found['ms'] <= found['slowest']
    assert found['images_per_second'] == pytest.approx(2e3 / found['ms'], abs=0.06)
    assert found['launches'] > 100 and {'kernel', 'calls', 'share'} == set(found['kernels'][0])


def test_the_tool_writes_what_a_step_finds(tmp_path):
    """Inference, which compares all forms of a model."""
    pages = ['--pages', ROOT / 'docs' / 'gpu.md']
    options = ['--device', 'cpu', '--tiny', '--out', tmp_path / 'out', '--steps', 'inference-1-S*', *pages]
    done = call_tool(TOOL, *options, folder=tmp_path)
    assert done.returncode == 1 and 'inference-1-Strip-MLP-T: done' in done.stdout, done.stdout
    assert f'{pages[1]} takes figures of a GPU, but the report is of no GPU' in last_line(done.stdout)
    rows = json.loads((tmp_path / 'out' / 'report.json').read_text())['steps']['inference-1-Strip-MLP-T']['result'][
        'rows'
    ]
    assert {row['model'] for row in rows} == {'Strip-MLP-T', 'Strip-MLP-T @deploy', 'Strip-MLP-T @reference'}
    assert all(row['images_per_second'] > 0 and row['image'] == '64 x 64' for row in rows)
    assert f'| inference-1-Strip-MLP-T | {rows[0]["model"]} | inference |' in done.stdout


def test_pages_take_the_tables_that_were_measured(tmp_path):
    shutil.copy(ROOT / 'docs' / 'gpu.md', tmp_path)
    rows = [dict(model='T', ms=1.2345, images_per_second=1234.5), dict(model='T @cudagraphs', error='a | b')]
    steps = {
        'inference-T': dict(state='done', seconds=1, result=dict(rows=rows)),
        'right': dict(state='failed', seconds=1, why='maps differ'),
    }
    environment = dict(device='Card 1', driver='2', torch='3', commit='4')
    page.fill_measured(tmp_path / 'gpu.md', dict(tiny=False, device='cuda', environment=environment, steps=steps))
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
    assert '| right | maps differ |' in text
    assert '<!-- gpu: memory -->\nnot measured yet\n<!-- end -->' in text


def test_the_tool_needs_a_gpu_unless_told_otherwise(tmp_path):
    done = call_tool(TOOL, folder=tmp_path)
    words = 'Error: --device cuda needs a GPU, and PyTorch sees none; --device cpu --tiny tries the steps'
    assert done.returncode == 1 and last_line(done.stdout) == words
