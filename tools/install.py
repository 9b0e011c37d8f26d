"""Install mmstrip and what it needs into the environment of the Python that runs this file.

`make demo` and `make install` call it for the project's own .venv; call it yourself to use your own environment:

    python tools/install.py                 # everything: the three toolboxes, deployment, demo, tests
    python tools/install.py classification  # what classifiers need, mmcv's compiled ops not among it

Every step looks first whether its work is done, so running it again does nothing, an interrupted run continues where
it stopped, and classification can be completed later. A torch >= 2.4 that is already there is kept. Works with and
without a GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / 'requirements' / 'tested.txt'
BUILD_TOOLS = ['setuptools', 'wheel', 'ninja', 'psutil', 'packaging']
PARTS = {
    'classification': ['classification', 'tools'],
    'all': ['classification', 'detection', 'segmentation', 'tools', 'deployment', 'demo', 'tests'],
}
MMCV, MMENGINE = 'onedl-mmcv', 'onedl-mmengine'
OLDEST_TORCH = (2, 4)
PREBUILT_SECONDS = 60  # to look for it and to fetch it
# Python's own flags hold -O3 and -g: twice the time, for ops that run no faster.
MMCV_FLAGS = '-O2 -g0 -DNDEBUG'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=PARTS, default='all', help='what to install (default: all)')
    parser.add_argument('--no-prebuilt', action='store_true', help='build mmcv even where a prebuilt wheel may fit')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if sys.version_info < (3, 10):
        sys.exit(f'mmstrip needs Python 3.10 or newer, but {sys.executable} is {sys.version.split()[0]}')
    with_ops = args.part != 'classification'
    steps = [
        ('torch and torchvision: 3 GB to fetch, 1 to 5 minutes on a fast line', torch_is_there, install_torch),
        (
            'mmcv with its compiled ops: 5 to 15 minutes to build on two cores, seconds if a built one is found',
            mmcv_ops_load,
            lambda: install_mmcv_with_ops(prebuilt=not args.no_prebuilt),
        )
        if with_ops
        else ('mmcv without its compiled ops: half a minute', mmcv_is_sound, install_mmcv_without_ops),
        ('toolboxes and what they need: up to 3 minutes', lambda: False, lambda: install_toolboxes(PARTS[args.part])),
        ('mmstrip itself, in editable form: seconds', mmstrip_is_there, install_mmstrip),
        ("mmstrip's operators: 2 minutes to build on two cores", operators_load, build_operators),
    ]
    run_steps(steps)
    reason = operators_problem()
    slow = f'no compiled operators, slower on CPUs ({reason}; see {log_of("operators")})'
    say('compiled operators: in use' if reason == 'None' else slow)


def run_steps(steps: list) -> None:
    """Say what there is to do, then do it, saying how long it took."""
    started = time.monotonic()
    done = [is_done() for _, is_done, _ in steps]
    say(f'into {sys.prefix}:')
    for number, ((name, _, _), there) in enumerate(zip(steps, done), 1):
        say(f'  {number}. {name.split(":")[0] + ": there" if there else name}')
    for number, ((name, _, work), there) in enumerate(zip(steps, done), 1):
        if there:
            continue
        begun = time.monotonic()
        say(f'step {number} of {len(steps)}, {name}')
        work()
        say(f'step {number} of {len(steps)}: {minutes(time.monotonic() - begun)}')
    say(f'done in {minutes(time.monotonic() - started)}, everything is in {sys.prefix}')


def torch_is_there() -> bool:
    """Refuses a torch that is too old, or that came without the torchvision that was built with it."""
    torch = version('torch')
    if torch is None:
        return False
    if tuple(map(int, torch.split('.')[:2])) < OLDEST_TORCH:
        sys.exit(f'mmstrip needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, but {torch} is installed')
    if version('torchvision') is None:
        sys.exit(f'torch {torch} is installed without torchvision: install the torchvision that was built with it')
    return True


def install_torch() -> None:
    pip('install', 'torch', 'torchvision')


def mmcv_ops_load() -> bool:
    return importlib.util.find_spec('mmcv') is not None and python_prints('import mmcv.ops; print(1)') == '1'


def mmcv_is_sound() -> bool:
    """Whether mmcv is there with ops that load, or without any: ops of another torch would stop every training."""
    spec = importlib.util.find_spec('mmcv')
    return spec is not None and (mmcv_ops_load() or not list(Path(spec.origin).parent.glob('_ext.*')))


def install_mmcv_without_ops() -> None:
    """Built where no torch is in sight, which leaves the ops out; pip's cache may hold a wheel for another torch."""
    if not prepare_mmcv(mmcv_is_sound):
        pip('install', '--quiet', '--no-cache-dir', MMCV)


def prepare_mmcv(is_right: Callable[[], bool]) -> bool:
    """Install what mmcv needs, then see whether it is right already; if not, take it off."""
    pip('install', '--quiet', *BUILD_TOOLS, 'numpy', *([] if has_original(MMENGINE) else [MMENGINE]))
    if is_right():
        return True
    if version('mmcv'):
        sys.exit(
            f'mmcv {version("mmcv")} (from OpenMMLab) is installed, but its compiled ops do not load; '
            'reinstall it for this torch, or uninstall it and run this again'
        )
    remove_mmcv()
    return False


def remove_mmcv() -> None:
    if version(MMCV):  # without ops, or for another torch
        pip('uninstall', '--quiet', '--yes', MMCV)


def install_mmcv_with_ops(prebuilt: bool) -> None:
    """mmcv with its compiled ops, which the detection and segmentation toolboxes need."""
    if prepare_mmcv(mmcv_ops_load):
        return
    if prebuilt and fetch_prebuilt_mmcv():
        return say('mmcv: a prebuilt wheel fits')
    build_mmcv()
    if not mmcv_ops_load():
        say("the wheel in pip's cache has no ops for this torch: building it from scratch")
        pip('cache', 'remove', MMCV.replace('-', '_'))
        remove_mmcv()
        build_mmcv()
    if not mmcv_ops_load():
        sys.exit(
            'mmcv was built, but its compiled ops do not load: '
            f'see the error of "{sys.executable} -c \'import mmcv.ops\'"'
        )


def fetch_prebuilt_mmcv() -> bool:
    """Ask mmcv's makers for a wheel for this torch, CUDA or not."""
    say(f'mmcv: looking for a prebuilt wheel, {PREBUILT_SECONDS} seconds at most')
    mim = [sys.executable, '-m', 'mim', 'install', '--only-binary', MMCV, *constraints(), MMCV]
    if subprocess.run(pip_command('install', '--quiet', 'onedl-mim')).returncode or not succeeds(mim, PREBUILT_SECONDS):
        return False
    importlib.invalidate_caches()
    if mmcv_ops_load():
        return True
    remove_mmcv()
    return False


def succeeds(command: list, seconds: float) -> bool:
    """Run a command without its words; one that takes longer is ended with all that it has started."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, start_new_session=True, **quiet) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def build_mmcv() -> None:
    flags = dict(os.environ, CFLAGS=os.environ.get('CFLAGS', MMCV_FLAGS))
    compile_with_progress('mmcv', pip_command('install', '--verbose', '--no-build-isolation', MMCV), env=flags)


def install_toolboxes(names: list) -> None:
    lines = [line for name in ['runtime', 'mminstall', *names] for line in requirements(name)]
    wanted = [line for line in lines if not has_original(re.split('[<>=]', line)[0])]
    pip('install', '--quiet', '--no-build-isolation', *wanted)  # no time where the versions are right
    if 'deployment' in names and has_mmdeploy_wheel() and version('mmdeploy') is None:
        pip('install', '--quiet', '--no-deps', *requirements('mmdeploy'))  # the file says why


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().split('\n')
    return [line for line in lines if line and not line.startswith('#')]


def has_mmdeploy_wheel() -> bool:
    """Elsewhere whole detectors cannot be exported, and all else works."""
    return (platform.system(), platform.machine()) == ('Linux', 'x86_64')


def mmstrip_is_there() -> bool:
    return version('mmstrip') is not None and (ROOT / 'mmstrip' / '.mim').is_dir()


def install_mmstrip() -> None:
    """Without its operators, which the next step builds in sight."""
    command = pip_command('install', '--quiet', '--no-deps', '--no-build-isolation', '--editable', str(ROOT))
    check(command, subprocess.run(command, env=dict(os.environ, MMSTRIP_NATIVE='0')).returncode)


def operators_problem() -> str:
    """Why the compiled operators do not load, 'None' if they do."""
    return python_prints('from mmstrip.ops import extension; print(extension.load())', cwd=ROOT)


def operators_load() -> bool:
    return operators_problem() == 'None'


def build_operators() -> None:
    """Nothing but speed on CPUs depends on them, so a failure is said at the end and stops nothing."""
    libraries = python_prints('from mmstrip.ops import extension; print(len(extension.VARIANTS))', cwd=ROOT)
    command = [sys.executable, 'setup.py', 'build_ext', '--inplace']
    compile_with_progress('operators', command, needed=False, libraries=int(libraries or 1))


def compile_with_progress(name: str, command: list, env=None, needed: bool = True, libraries: int = 1) -> None:
    """Run a build in the project's folder and say how far it is, by ninja's count; a log keeps all that it prints."""
    log = log_of(name)
    started = last = first = time.monotonic()
    before = 0  # files of the libraries that are done
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process, log.open('w') as file:
        for line in process.stdout:
            file.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step is None:
                continue
            now = time.monotonic()
            done, files = map(int, step.groups())
            compiled, total = before + done, files * libraries
            before += files * (done == files)
            if compiled == 1:
                first = now  # what came before, unpacking and configuring, says nothing of the rest
            elif now - last > 30:
                last, left = now, (now - first) * (total - compiled) / (compiled - 1)
                spent = minutes(now - started)
                say(f'{name}: {compiled} of {total} files compiled in {spent}, about {minutes(left)} left')
    if process.returncode:
        (sys.exit if needed else say)(f'{name} could not be built, see {log}')


def log_of(name: str) -> Path:
    return Path(sys.prefix) / f'{name}-build.log'


def has_original(distribution: str) -> bool:
    """Whether OpenMMLab's own distribution stands where this onedl one would go."""
    original = {'onedl-mmdetection': 'mmdet'}.get(distribution, distribution.removeprefix('onedl-'))
    return original != distribution and version(original) is not None


def version(distribution: str):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_prints(code: str, cwd: str | Path = os.sep) -> str:
    """The last line that a fresh Python prints, '' if it fails."""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd)
    return result.stdout.strip().split('\n')[-1] if result.returncode == 0 else ''


def constraints() -> list:
    """The tested versions, unless the environment came with another torch and so has a life of its own."""
    tested = re.search(r'^torch==(.*)$', TESTED.read_text(), re.MULTILINE).group(1)
    return ['-c', str(TESTED)] if (version('torch') or tested).split('+')[0] == tested else []


def pip_command(*args: str) -> list:
    options = constraints() if args[0] == 'install' else []
    return [sys.executable, '-m', 'pip', '--disable-pip-version-check', *args, *options]


def pip(*args: str) -> None:
    check(['pip', *args], subprocess.run(pip_command(*args)).returncode)
    importlib.invalidate_caches()


def check(command: list, returncode: int) -> None:
    if returncode:
        sys.exit(f'"{" ".join(command)}" failed, see above; run this again to continue from here')


def minutes(seconds: float) -> str:
    return f'{seconds / 60:.1f} min'


def say(text: str) -> None:
    print(f'[install] {text}', flush=True)


if __name__ == '__main__':
    main()
