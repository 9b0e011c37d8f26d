"""Install mmstrip and its dependencies into the environment of the Python that runs this file.

`make demo` and `make install` call it for the project's own .venv. To use your own environment:
  python tools/install.py                 # everything: the three toolboxes, deployment, demo, tests
  python tools/install.py classification  # for classifiers only, without mmcv's compiled ops

Existing packages are kept: torch >= 2.4, an mmcv whose ops load, OpenMMLab's own distributions. An interrupted run
continues where it stopped, and classification can be completed later. Works with and without a GPU.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / 'requirements' / 'tested.txt'
PARTS = {
    'classification': ['classification', 'tools'],
    'all': ['classification', 'detection', 'segmentation', 'tools', 'deployment', 'demo', 'docs', 'tests'],
}
BUILD_TOOLS = ['setuptools', 'wheel', 'ninja', 'psutil', 'packaging', 'numpy']
MMCV, MMENGINE = 'onedl-mmcv', 'onedl-mmengine'
OLDEST_TORCH = (2, 4)
# Python's own flags contain -O3 and -g, which double the build time without faster ops.
MMCV_FLAGS = dict(CFLAGS=os.environ.get('CFLAGS', '-O2 -g0 -DNDEBUG'))
FAIL_FAST = dict(PIP_RETRIES='0', PIP_TIMEOUT='20')  # for a wheel that may not exist


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=PARTS, default='all', help='what to install (default: all)')
    parser.add_argument('--no-prebuilt', action='store_true', help='build mmcv even if a prebuilt wheel may fit')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if sys.version_info < (3, 10):
        sys.exit(f'mmstrip needs Python 3.10 or newer, but {sys.executable} is {sys.version.split()[0]}')
    check_torch()
    started = time.monotonic()
    say(f'installing into {sys.prefix}')
    say('1 of 5: torch and torchvision, 3 GB, 1 to 5 minutes on a fast connection')
    pip('install', 'torch', 'torchvision')
    pip('install', *BUILD_TOOLS, *([] if has_original(MMENGINE) else [MMENGINE]))
    if args.part == 'classification':
        say('2 of 5: mmcv without its compiled ops, half a minute')
        # In isolation from torch, which leaves the ops out; pip's cache may contain a wheel for another torch.
        install_mmcv(False, [partial(pip, 'install', '--no-cache-dir', MMCV)])
    else:
        say('2 of 5: mmcv with its compiled ops, 5 to 15 minutes on two cores, seconds with a prebuilt wheel')
        from_scratch = partial(build_mmcv, '--no-cache-dir')  # if the cached wheel is for another torch
        install_mmcv(True, [fetch_mmcv] * (not args.no_prebuilt) + [build_mmcv, from_scratch])
    say('3 of 5: toolboxes and their dependencies, up to 3 minutes')
    install_toolboxes(PARTS[args.part])
    say('4 of 5: mmstrip itself, in editable mode, seconds')
    pip('install', '--no-deps', '--no-build-isolation', '--editable', str(ROOT), MMSTRIP_NATIVE='0')
    say("5 of 5: mmstrip's operators, 2 minutes to build on two cores")
    if operators_problem():
        build('operators', [sys.executable, 'setup.py', 'build_ext', '--inplace'])  # optional, for speed
    reason = operators_problem()
    slow = f'compiled operators: not available, slower on CPUs ({reason}; see {log_of("operators")})'
    say(slow if reason else 'compiled operators: in use')
    say(f'done in {minutes_since(started)}; everything is in {sys.prefix}')


def check_torch() -> None:
    """Reject a torch that is too old or has no matching torchvision."""
    torch = version('torch')
    if torch is None:
        return
    if tuple(map(int, torch.split('.')[:2])) < OLDEST_TORCH:
        sys.exit(f'mmstrip needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, but {torch} is installed')
    if version('torchvision') is None:
        sys.exit(f'torch {torch} is installed without torchvision: install the torchvision release that matches it')


def install_mmcv(with_ops: bool, attempts: list) -> None:
    """Keep mmcv if it is right; otherwise uninstall it and try the attempts in turn."""
    for attempt in attempts:
        if mmcv_is_right(with_ops):
            return
        if version('mmcv'):
            sys.exit(
                f'mmcv {version("mmcv")} (from OpenMMLab) is installed, but its compiled ops do not load; '
                'reinstall it for this torch, or uninstall it and run this script again'
            )
        if version(MMCV):
            pip('uninstall', '--yes', MMCV)
        attempt()
    if not mmcv_is_right(with_ops):
        sys.exit(f'mmcv does not work: see {log_of("mmcv")} and run "{sys.executable} -c \'import mmcv.ops\'"')


def mmcv_is_right(with_ops: bool) -> bool:
    """Whether its ops load, or whether there are none if none are needed: ops of another torch break any training."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec('mmcv')
    if spec is None or python_prints('import mmcv.ops; print(1)') == '1':
        return spec is not None
    return not with_ops and not list(Path(spec.origin).parent.glob('_ext.*'))


def fetch_mmcv() -> None:
    """Install mmcv's official wheel for this torch, CUDA or not, if there is one."""
    pip('install', 'onedl-mim')
    mim = [sys.executable, '-m', 'mim', 'install', '--quiet', '--only-binary', MMCV, *constraints(), MMCV]
    subprocess.run(mim, env={**os.environ, **FAIL_FAST}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def build_mmcv(*options: str) -> None:
    """Build mmcv, or reuse the wheel of an earlier build in pip's cache."""
    build('mmcv', pip_command('install', '--verbose', '--no-build-isolation', *options, MMCV), **MMCV_FLAGS)


def install_toolboxes(names: list) -> None:
    lines = [line for name in ['runtime', 'mminstall', *names] for line in requirements(name)]
    wanted = [line for line in lines if not has_original(re.split('[<>=]', line)[0])]
    pip('install', '--no-build-isolation', *wanted)
    # mmdeploy has wheels for these machines only; elsewhere everything works except the export of whole detectors.
    if 'deployment' in names and (platform.system(), platform.machine()) == ('Linux', 'x86_64'):
        pip('install', '--no-deps', *requirements('mmdeploy'))  # its file says why


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().split('\n')
    return [line for line in lines if line and not line.startswith('#')]


def operators_problem() -> str:
    """Why the compiled operators do not load; '' if they do."""
    return python_prints('from mmstrip.ops import extension; print(extension.load() or "")', cwd=ROOT)


def build(name: str, command: list, **environment: str) -> None:
    """Run a build in the project's folder, report progress by ninja's count, and write its output to a log."""
    started = said = time.monotonic()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment})
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process, log_of(name).open('w') as log:
        for line in process.stdout:
            log.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step and time.monotonic() - said > 30:
                said = time.monotonic()
                say(f'{name}: {step[1]} of {step[2]} files compiled in {minutes_since(started)}')
    if process.returncode:
        say(f'{name} could not be built: see {log_of(name)}')


def log_of(name: str) -> Path:
    return Path(sys.prefix) / f'{name}-build.log'


def has_original(distribution: str) -> bool:
    """Whether OpenMMLab's own distribution is installed instead of this onedl one."""
    original = {'onedl-mmdetection': 'mmdet'}.get(distribution, distribution.removeprefix('onedl-'))
    return original != distribution and version(original) is not None


def version(distribution: str):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_prints(code: str, cwd: str | Path = os.sep) -> str:
    """The last line that a new Python process prints; its error if it fails."""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd)
    return (result.stderr if result.returncode else result.stdout).strip().split('\n')[-1]


def constraints() -> list:
    """The tested versions, unless the environment already has another torch."""
    tested = re.search(r'^torch==(.*)$', TESTED.read_text(), re.MULTILINE).group(1)
    return ['-c', str(TESTED)] if (version('torch') or tested).split('+')[0] == tested else []


def pip_command(command: str, *args: str) -> list:
    options = constraints() if command == 'install' else []
    return [sys.executable, '-m', 'pip', '--disable-pip-version-check', command, *args, *options]


def pip(command: str, *args: str, **environment: str) -> None:
    """Run pip; if it fails, exit and say how to continue."""
    run = pip_command(command, '--quiet', *args)
    if subprocess.run(run, env={**os.environ, **environment}).returncode:
        sys.exit(f'"pip {command} {" ".join(args)}" failed, see above. Run this script again to continue from here')


def minutes_since(started: float) -> str:
    return f'{(time.monotonic() - started) / 60:.1f} min'


def say(text: str) -> None:
    print(f'[install] {text}', flush=True)


if __name__ == '__main__':
    main()
