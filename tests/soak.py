"""A long run, watched: python tests/soak.py [EPOCHS]   (make soak)

Trains the tiny digits classifier (3 iterations and a validation an epoch; 700 epochs by default) and reports the slope
of its memory, how right the announced ETA was, and which files are left. Then kills a training twenty times and
compares its end with that of one that nobody disturbs. Not part of the test suite.
"""

import datetime
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from helpers.kills import assert_same_end, kill_repeatedly
from helpers.runs import children, finish, log, start
from rich.progress import track
from scipy.stats import theilslopes

STATUS = re.compile(r'^(\S+ \S+) - .*Epoch\(train\) +\[(\d+)\].* eta: (\d+):(\d+):(\d+)', re.MULTILINE)


def resident(pid: int) -> float:
    """Memory of a process in MiB; 0 if it has ended."""
    status = Path(f'/proc/{pid}/status')
    found = status.exists() and re.search(r'^VmRSS:\s+(\d+) kB', status.read_text(), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0


def watch(folder: Path, epochs: int) -> list[tuple[int, float]]:
    """Epoch and MiB of the training and its workers, at the end of each epoch but the last."""
    options = {'train_cfg.max_epochs': epochs, 'default_hooks.logger.interval': 3, 'randomness.seed': 0}
    process, memory = start(folder, options), []
    for epoch in track(range(1, epochs + 1), 'Training'):
        while process.is_alive() and log(folder).count('Saving checkpoint') < epoch:
            time.sleep(0.5)
        if resident(process.pid):
            memory.append((epoch, resident(process.pid) + sum(map(resident, children(process.pid)))))
    process.join()
    assert process.exitcode == 0, log(folder)[-2000:]
    return memory


def report_eta(text: str) -> None:
    lines = [(_moment(stamp), int(epoch), [int(part) for part in left]) for stamp, epoch, *left in STATUS.findall(text)]
    end = lines[-1][0]
    for share in (0.25, 0.5, 0.75):
        moment, epoch, (hours, minutes, seconds) = lines[int(share * len(lines))]
        announced, real = 3600 * hours + 60 * minutes + seconds, (end - moment).total_seconds()
        print(f'ETA at epoch {epoch}: announced {announced} s, real {real:.0f} s ({announced / real - 1:+.0%})')


def _moment(stamp: str) -> datetime.datetime:
    return datetime.datetime.strptime(stamp, '%m/%d %H:%M:%S')


def main(epochs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory = np.array(watch(folder, epochs)[epochs // 10 :])
        slope = theilslopes(memory[:, 1], 3 * memory[:, 0]).slope
        tenths = ', '.join(f'{mib:.1f}' for mib in memory[:: max(1, len(memory) // 9), 1])
        print(f'{3 * epochs} iterations; MiB from 10 % on, in tenths: {tenths}')
        print(f'Slope {1024 * slope:+.3f} KiB an iteration, which is {slope * 1e6 / 1024:+.2f} GiB in a million')
        report_eta(log(folder))
        for file in sorted(folder.rglob('*')):
            if file.is_file():
                print(f'{file.relative_to(folder)}: {file.stat().st_size / 1024:.0f} KiB')


def check_fault_tolerance(kills: int = 20) -> None:
    settings = {'randomness.seed': 5, 'train_cfg.max_epochs': 24}
    with tempfile.TemporaryDirectory() as name:
        expected = finish(Path(name) / 'undisturbed', settings)
        during_save = kill_repeatedly(Path(name) / 'killed', settings, kills)
        assert during_save >= 3, during_save
        assert_same_end(finish(Path(name) / 'killed', settings), expected)
        print(f'{kills} kills, {during_save} of them during a save: the same weights, bit for bit')


if __name__ == '__main__':
    check_fault_tolerance()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 700)
