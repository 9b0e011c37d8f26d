"""Steps of a report that end in each way."""

import os
import signal
import time

from benchmarks.gpu.steps import NotRunError, Setting, Steps


def steps(setting: Setting) -> Steps:
    return dict(good=good, bad=bad, dies=dies, hangs=hangs, cannot=cannot, last=good)


def good(setting: Setting) -> dict:
    return dict(answer=42)


def bad(setting: Setting) -> dict:
    raise ValueError('two is not three')


def dies(setting: Setting) -> dict:
    print('the kernel is out of memory', flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setting: Setting) -> dict:
    time.sleep(600)


def cannot(setting: Setting) -> dict:
    raise NotRunError('there is no such thing here')
