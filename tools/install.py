"""Install mmstrip and what it needs into the environment of the Python that runs this file.

`make install` calls it for the project's own .venv; call it yourself to use your own environment:

    python tools/install.py

Every step looks first whether its work is done, so running it again does nothing, and an interrupted run continues
where it stopped. A torch >= 2.4 that is already there is kept. Works with and without a GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / 'requirements' / 'tested.txt'
BUILD_TOOLS = ['setuptools', 'wheel', 'ninja', 'psutil', 'packaging']
TOOLBOXES = ['classification', 'detection', 'segmentation', 'deployment', 'tests']
MMCV = 'onedl-mmcv'
BUILD_MINUTES = 15  # on two idle cores
OLDEST_TORCH = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--no-prebuilt', action='store_true', help='build mmcv even where a prebuilt wheel may fit')
    args = parser.parse_args()
    if sys.version_info < (3, 10):
        sys.exit(f'mmstrip needs Python 3.10 or newer, but {sys.executable} is {sys.version.split()[0]}')
    started = time.monotonic()
    install_torch()
    install_mmcv(prebuilt=not args.no_prebuilt)
    install_toolboxes()
    install_mmstrip()
    build_operators()
    say(f'done in {minutes(time.monotonic() - started)}, everything is in {sys.prefix}')


def install_torch() -> None:
    """torch and torchvision as a pair: a torchvision built for CUDA does not load beside a CPU-only torch."""
    torch, torchvision = version('torch'), version('torchvision')
    if torch is None:
        say('torch and torchvision: about 3 GB to fetch, 3 minutes on a fast line')
        return pip('install', 'torch', 'torchvision')
    if tuple(map(int, torch.split('.')[:2])) < OLDEST_TORCH:
        sys.exit(f'mmstrip needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, but {torch} is installed')
    if torchvision is None:
        sys.exit(f'torch {torch} is installed without torchvision: install the torchvision that was built with it')
    say(f'torch {torch} is there')


def install_mmcv(prebuilt: bool) -> None:
    """mmcv with its compiled ops, which the detection and segmentation toolboxes need."""
    if mmcv_ops_load():
        return say(f'mmcv {version(MMCV) or version("mmcv")} with compiled ops is there')
    if version('mmcv'):
        sys.exit(
            f'mmcv {version("mmcv")} (from OpenMMLab) is installed, but its compiled ops do not load; '
            'reinstall it for this torch, or uninstall it and run this again'
        )
    if prebuilt and python_prints('import torch; print(torch.cuda.is_available())') == 'True':
        say('mmcv: looking for a prebuilt wheel for this torch and CUDA')
        if fetch_prebuilt_mmcv():
            return
        say('no prebuilt wheel fits, or none could be reached')
    pip('install', *BUILD_TOOLS, 'numpy')
    if version(MMCV):  # there, but without ops or for another torch
        pip('uninstall', '--yes', MMCV)
    build_mmcv()
    if not mmcv_ops_load():
        say("the wheel in pip's cache has no ops for this torch: building it from scratch")
        pip('cache', 'remove', MMCV.replace('-', '_'))
        pip('uninstall', '--yes', MMCV)
        build_mmcv()
    if not mmcv_ops_load():
        sys.exit(
            'mmcv was built, but its compiled ops do not load: '
            f'see the error of "{sys.executable} -c \'import mmcv.ops\'"'
        )


def fetch_prebuilt_mmcv() -> bool:
    if subprocess.run(pip_command('install', '--quiet', 'onedl-mim')).returncode:
        return False
    command = [sys.executable, '-m', 'mim', 'install', '--only-binary', MMCV, *constraints(), MMCV]
    return subprocess.run(command).returncode == 0 and mmcv_ops_load()


def build_mmcv() -> None:
    """Build and install mmcv, showing how far the compiler is; a wheel in pip's cache is used at once."""
    say(
        f'mmcv: building its compiled ops takes about {BUILD_MINUTES} minutes on two cores '
        "(seconds if pip's cache has the wheel)"
    )
    log = Path(sys.prefix) / 'mmcv-build.log'
    started = last = first = time.monotonic()
    command = pip_command('install', '--verbose', '--no-build-isolation', MMCV)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        log.open('w') as file,
    ):
        for line in process.stdout:
            file.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step is None:
                continue
            now = time.monotonic()
            compiled, total = map(int, step.groups())
            if compiled == 1:
                first = now  # what came before, unpacking and configuring, says nothing of the rest
            elif now - last > 60:
                last, left = now, (now - first) * (total - compiled) / (compiled - 1)
                spent = minutes(now - started)
                say(f'mmcv: {compiled} of {total} files compiled in {spent}, about {minutes(left)} left')
    if process.returncode:
        sys.exit(f'mmcv could not be built, see {log}')


def install_toolboxes() -> None:
    files = [ROOT / 'requirements' / f'{name}.txt' for name in ['runtime', 'mminstall', *TOOLBOXES]]
    lines = [line for file in files for line in file.read_text().split('\n') if line]
    wanted = [line for line in lines if not has_original(re.split('[<>=]', line)[0])]
    say('the toolboxes and their requirements')
    pip('install', '--quiet', '--no-build-isolation', *wanted)  # no time where the versions are right


def install_mmstrip() -> None:
    if version('mmstrip') and (ROOT / 'mmstrip' / '.mim').is_dir():
        return say(f'mmstrip {version("mmstrip")} is there')
    say('installing mmstrip itself, in editable form; compiling its operators takes two minutes')
    pip('install', *BUILD_TOOLS)
    pip('install', '--no-deps', '--no-build-isolation', '--editable', str(ROOT))


def build_operators() -> None:
    """Build the compiled operators where their sources have changed; nothing but speed on CPUs depends on them."""
    log = Path(sys.prefix) / 'mmstrip-build.log'
    with log.open('w') as file:
        command = [sys.executable, 'setup.py', 'build_ext', '--inplace']
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    reason = python_prints('from mmstrip.ops import extension; print(extension.load())')
    if reason == 'None':
        return say('compiled operators: in use')
    say(f'no compiled operators ({reason}): mmstrip works without them, slower on CPUs; see {log}')


def has_original(distribution: str) -> bool:
    """Whether OpenMMLab's own distribution stands where this onedl one would go."""
    original = {'onedl-mmdetection': 'mmdet'}.get(distribution, distribution.removeprefix('onedl-'))
    return original != distribution and version(original) is not None


def version(distribution: str):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def mmcv_ops_load() -> bool:
    return importlib.util.find_spec('mmcv') is not None and python_prints('import mmcv.ops; print(1)') == '1'


def python_prints(code: str) -> str:
    """What a fresh Python prints, '' if it fails."""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=os.sep)
    return result.stdout.strip().split('\n')[-1] if result.returncode == 0 else ''


def constraints() -> list:
    """The tested versions, unless the environment came with another torch and so has a life of its own."""
    tested = re.search(r'^torch==(.*)$', TESTED.read_text(), re.MULTILINE).group(1)
    return ['-c', str(TESTED)] if (version('torch') or tested).split('+')[0] == tested else []


def pip_command(*args: str) -> list:
    options = constraints() if args[0] == 'install' else []
    return [sys.executable, '-m', 'pip', '--disable-pip-version-check', *args, *options]


def pip(*args: str) -> None:
    result = subprocess.run(pip_command(*args))
    if result.returncode:
        sys.exit(f'"pip {" ".join(args)}" failed, see above; run this again to continue from here')
    importlib.invalidate_caches()


def minutes(seconds: float) -> str:
    return f'{seconds / 60:.1f} min'


def say(text: str) -> None:
    print(f'[install] {text}', flush=True)


if __name__ == '__main__':
    main()
