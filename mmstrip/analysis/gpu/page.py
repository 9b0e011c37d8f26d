"""The report on a card: one JSON file and one page, from what its steps have left."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...utils.files import write_file
from ..evidence_report import markdown_table
from ..runs import write_json
from .environment import describe
from .right import DETECTORS, SEGMENTORS
from .steps import DONE, FAILED, PARTS, Setting, results

TITLES = {
    'right': 'Is it right?',
    'fast': 'How fast is it?',
    'many': 'On many cards',
    'trained': 'Does it train?',
}
NOT_MEASURED = 'not measured yet'
_SHOWN = (
    'cards',
    'memory_gib',
    'driver',
    'cuda',
    'cudnn',
    'python',
    'torch',
    'triton',
    'mmstrip',
    'commit',
    'cpu',
    'cores',
)
_SPEED_HEAD = ('model', 'mode', 'image', 'batch', 'dtype', 'images/s', 'ms', 'peak MiB', 'of products', 'difference')


def write_report(setting: Setting) -> list[Path]:
    """Write ``report.json`` and ``report.md`` beside the results.

    Returns:
        Both files.
    """
    found = list(results(setting))
    environments = [left['environment'] for *_, left in found if 'environment' in left]
    report = dict(
        environment=environments[-1] if environments else describe(setting.device),
        device=setting.device,
        tiny=setting.tiny,
        command=_command(setting),
        parts={part: {name: left for other, name, left in found if other == part} for part in PARTS},
    )
    out = Path(setting.out)
    write_json(out / 'report.json', report)
    text = '\n'.join(_page(report)) + '\n'
    write_file(out / 'report.md', lambda file: file.write(text.encode()))
    return [out / 'report.json', out / 'report.md']


def _command(setting: Setting) -> str:
    options = [f'--device {setting.device}'] * (not setting.cuda) + ['--tiny'] * setting.tiny
    return ' '.join(['python tools/analysis_tools/gpu_report.py', *options])


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with numbers cut to what a reader wants."""
    return markdown_table(head, [[_cell(cell) for cell in row] for row in rows])


def _cell(value) -> str:
    if value is None:
        return ''
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'
    return str(value).replace('|', '/').replace('\n', ' ')


def _page(report: dict) -> Iterator[str]:
    environment = report['environment']
    yield f'# {environment["device"]}\n'
    if not report['device'].startswith('cuda'):
        yield '**These figures are of a CPU: they show that the steps run, and say nothing of a GPU.**\n'
    if report['tiny']:
        yield '**Smallest networks and images: no figure here means anything.**\n'
    yield table(('', ''), [(name, environment[name]) for name in _SHOWN if name in environment])
    toolboxes = [environment[name] for name in ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg')]
    yield f'\nToolboxes: {", ".join(toolboxes)}.'
    yield f'Command: `{report["command"]}`.\n'
    for part, steps in report['parts'].items():
        yield f'## {TITLES[part]}\n'
        yield table(('step', 'state', 'seconds', 'why'), [_state(name, left) for name, left in steps.items()]) + '\n'
        yield from _RENDER[part]({name: left['result'] for name, left in steps.items() if left['state'] == DONE})


def _state(name: str, left: dict) -> tuple:
    return name, left['state'], left.get('seconds'), left.get('error') or left.get('reason')


def _right(steps: dict[str, dict]) -> Iterator[str]:
    """The largest error of each check."""
    trained = {**DETECTORS, **SEGMENTORS}
    checked = {name: result for name, result in steps.items() if name not in trained}
    rows = [(name, where, f'{error:.1e}') for name, result in checked.items() for where, error in _errors(result)]
    if rows:
        yield "Largest errors relative to float64 on the CPU (of parity: absolute, to the authors' outputs):\n"
        yield table(('step', 'what', 'error'), rows) + '\n'
    for name in trained:
        if name in steps:
            yield f'A training step of {name}: {_words(steps[name])}.\n'


def _errors(result: dict, where: str = '') -> Iterator[tuple[str, float]]:
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _errors(value, f'{where}{name}, ')
        elif isinstance(value, float) and (name in ('maps', 'gradients', 'logits') or name.startswith('stage')):
            yield f'{where}{name}', value


def _words(result: dict) -> str:
    return ', '.join(f'{name} {_cell(value)}' for name, value in result.items())


def _fast(steps: dict[str, dict]) -> Iterator[str]:
    if 'limits' in steps:
        limits = steps['limits']
        rates = _words({name: rate / 1e3 for name, rate in limits['matmul_gflops'].items()})
        yield f'Limits: a copy {_cell(limits["copy_gb_per_second"])} GB/s; a large matrix product, TFLOP/s: {rates}.\n'
        for mode in ('train', 'inference'):
            yield f'Strip-MLP-T layer by layer, {mode}: {_words(limits[mode])}.\n'
    rows = sorted(row for result in steps.values() if 'results' in result for row in _speeds(result))
    if rows:
        yield table(_SPEED_HEAD, [row[1:] for row in rows]) + '\n'
    failed = {label: words for result in steps.values() for label, words in result.get('failed', {}).items()}
    if failed:
        yield table(('did not run', 'why'), list(failed.items())) + '\n'
    if 'implementations' in steps:
        rows = [tuple(row.values()) for row in steps['implementations']['rows']]
        yield f'A block in training, batch {steps["implementations"]["batch"]}, bfloat16:\n'
        yield table(('stage', 'implementation', 'ms', 'peak MiB'), rows) + '\n'
    for mode, found in steps.get('kernels', {}).items():
        took = f'{found["count"]:,} kernels, fills and copies in {_cell(found["ms"])} ms'
        yield f'{mode.capitalize()}, batch {found["batch"]}: {took}; the costliest:\n'
        yield (
            table(('kernel', 'calls', 'share'), [(name[:90], calls, part) for name, calls, part in found['kernels']])
            + '\n'
        )
        yield table(('module', 'operation', 'share'), found['operations']) + '\n'
    if 'memory' in steps:
        yield 'Peak memory of a training step in bfloat16, beyond the weights:\n'
        yield memory_table(steps['memory']['rows']) + '\n'


def _speeds(report: dict) -> Iterator[tuple]:
    """Rows, the first cell to sort by."""
    settings = report['settings']
    for one in report['results']:
        height, width = one['shape']
        case = one['mode'], f'{height}x{width}', settings['batch'], one['dtype']
        speed = one['images_per_second'], 1e3 * one['median'], one['peak_mib'], one['of_ceiling']
        order = one['mode'], height * width, settings['batch'], one['dtype'], -one['images_per_second'], one['label']
        yield order, one['label'], *case, *speed, one['difference']


def memory_table(rows: Sequence[dict]) -> str:
    """Of the rows of step 'memory'."""
    cells = [
        (
            row['model'],
            'yes' if row['checkpointing'] else 'no',
            '{}x{}'.format(*row['shape']),
            row['batch'],
            row['peak_mib'] or 'too much',
            row['weights_mib'],
        )
        for row in rows
    ]
    return table(('model', 'checkpointing', 'image', 'batch', 'peak MiB', 'weights MiB'), cells)


def _many(steps: dict[str, dict]) -> Iterator[str]:
    rows = [
        (name, *(left[key] for key in ('cards', 'backend', 'images_per_second', 'step_ms', 'data_ms', 'memory_mib')))
        for name, left in steps.items()
        if 'images_per_second' in left
    ]
    if rows:
        yield table(('training', 'processes', 'backend', 'images/s', 'ms', 'of it data', 'MiB'), rows) + '\n'
        yield from (f'- `{left["command"]}`' for left in steps.values() if 'command' in left)
    if 'sharded-base' in steps:
        yield f'\nFSDP of `base`: {_words(steps["sharded-base"])}.\n'


def _trained(steps: dict[str, dict]) -> Iterator[str]:
    rows = [
        (name, 100 * left['top-1'], left['epochs'], left['minutes'], left['images'], left['params'] / 1e6)
        for name, left in steps.items()
    ]
    if rows:
        yield table(('model', 'top-1, %', 'epochs', 'minutes', 'images', 'params, M'), rows) + '\n'
        yield "The paper's 90.1 % of Strip-MLP-T* is of 300 epochs, which these are not.\n"
        yield from (f'- `{left["command"]}`' for left in steps.values())


_RENDER = {'right': _right, 'fast': _fast, 'many': _many, 'trained': _trained}


def fill_page(page: Path, report: dict) -> None:
    """Put the memory of a report between ``<!-- gpu: memory -->`` and ``<!-- end -->`` of a page.

    Raises:
        ValueError: The report is of a CPU or of the smallest networks.
    """
    if report['tiny'] or not report['device'].startswith('cuda'):
        raise ValueError(f'{page} takes figures of a GPU, but the report is of {report["environment"]["device"]}')
    left = report['parts']['fast']['memory']
    words = memory_table(left['result']['rows']) if left['state'] == DONE else NOT_MEASURED
    text = re.sub(
        r'<!-- gpu: memory -->.*?<!-- end -->',
        lambda _: f'<!-- gpu: memory -->\n{report["environment"]["device"]}:\n\n{words}\n<!-- end -->',
        page.read_text(),
        flags=re.S,
    )
    write_file(page, lambda file: file.write(text.encode()))


def failures(setting: Setting) -> list[str]:
    return [f'{part}/{name}' for part, name, left in results(setting) if left['state'] == FAILED]


def read_report(setting: Setting) -> dict:
    return json.loads((Path(setting.out) / 'report.json').read_text())
