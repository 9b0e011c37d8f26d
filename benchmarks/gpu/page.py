"""The report on a card: one JSON file and one page, from what its steps have left."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..machine import describe
from ..results import markdown_table, write_json, write_text
from .steps import DONE, FAILED, PARTS, Setting, results

TITLES = {
    'right': 'Is it right?',
    'fast': 'How fast is it?',
    'many': 'On many cards',
    'trained': 'Does it train?',
}
NOT_MEASURED = 'not measured yet'
_SPEED_HEAD = ('model', 'mode', 'image', 'batch', 'dtype', 'images/s', 'ms', 'peak MiB', 'of products', 'difference')


def write_report(setting: Setting) -> list[Path]:
    """Write ``report.json`` and ``report.md`` beside the results.

    Returns:
        Both files.
    """
    found = list(results(setting))
    environments = [left['environment'] for *_, left in found if 'environment' in left]
    options = [f'--device {setting.device}'] * (not setting.cuda) + ['--tiny'] * setting.tiny
    report = dict(
        environment=environments[-1] if environments else describe(setting.device),
        device=setting.device,
        tiny=setting.tiny,
        command=' '.join(['python -m benchmarks.gpu', *options]),
        parts={part: {name: left for other, name, left in found if other == part} for part in PARTS},
    )
    out = Path(setting.out)
    write_json(out / 'report.json', report)
    write_text(out / 'report.md', '\n'.join(_page(report)) + '\n')
    return [out / 'report.json', out / 'report.md']


def _page(report: dict) -> Iterator[str]:
    yield f'# {report["environment"]["device"]}\n'
    if not report['device'].startswith('cuda'):
        yield '**These figures are of a CPU: they show that the steps run, and say nothing of a GPU.**\n'
    if report['tiny']:
        yield '**Smallest networks and images: no figure here means anything.**\n'
    yield table(('', ''), list(report['environment'].items()))
    yield f'\nCommand: `{report["command"]}`.\n'
    for part, steps in report['parts'].items():
        yield f'## {TITLES[part]}\n'
        states = [
            (name, left['state'], left.get('seconds'), left.get('error') or left.get('reason'))
            for name, left in steps.items()
        ]
        yield table(('step', 'state', 'seconds', 'why'), states) + '\n'
        done = {name: left['result'] for name, left in steps.items() if left['state'] == DONE}
        speeds = sorted(row for result in done.values() if 'results' in result for row in _speeds(result))
        if speeds:
            yield table(_SPEED_HEAD, [row[1:] for row in speeds]) + '\n'
        others = {name: result if 'results' not in result else result['failed'] for name, result in done.items()}
        numbers = [(name, *row) for name, result in others.items() for row in _numbers(result)]
        if numbers:
            yield table(('step', 'of', 'found'), numbers) + '\n'
        for name, result in others.items():
            yield from _tables(result, name)


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with numbers cut to what a reader wants."""
    return markdown_table(head, [[_cell(cell) for cell in row] for row in rows])


def table_of(rows: Sequence[dict]) -> str:
    """A table of dicts with the same keys."""
    return table([name.replace('_', ' ') for name in rows[0]], [list(row.values()) for row in rows])


def _cell(value) -> str:
    if value is None:
        return ''
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'
    if isinstance(value, list):
        return (
            ' x '.join(map(_cell, value))
            if all(isinstance(one, int) for one in value)
            else ', '.join(map(_cell, value))
        )
    return str(value).replace('|', '/').replace('\n', ' ')


def _speeds(report: dict) -> Iterator[tuple]:
    """Rows of a benchmark, the first cell to sort by."""
    settings = report['settings']
    for one in report['results']:
        height, width = one['shape']
        case = one['mode'], f'{height}x{width}', settings['batch'], one['dtype']
        speed = one['images_per_second'], 1e3 * one['median'], one['peak_mib'], one['of_ceiling']
        order = one['mode'], height * width, settings['batch'], one['dtype'], -one['images_per_second'], one['label']
        yield order, one['label'], *case, *speed, one['difference']


def _numbers(result: dict, of: str = '') -> Iterator[tuple[str, str]]:
    """What a step has found, a row for each dict in it, but tables."""
    plain = {name: value for name, value in result.items() if not isinstance(value, dict) and not _is_table(value)}
    if plain:
        yield of, ', '.join(f'{name} {_cell(value)}' for name, value in plain.items())
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _numbers(value, f'{of}, {name}' if of else name)


def _tables(result: dict, title: str) -> Iterator[str]:
    """The tables that a step has found, with their names."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _tables(value, f'{title}, {name}')
        elif _is_table(value):
            yield f'{title}, {name}:\n\n{table_of(value)}\n'


def _is_table(value) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def fill_page(page: Path, report: dict) -> None:
    """Put the memory of a report between ``<!-- gpu: memory -->`` and ``<!-- end -->`` of a page.

    Raises:
        ValueError: The report is of a CPU or of the smallest networks.
    """
    if report['tiny'] or not report['device'].startswith('cuda'):
        raise ValueError(f'{page} takes figures of a GPU, but the report is of {report["environment"]["device"]}')
    left = report['parts']['fast']['memory']
    words = table_of(left['result']['rows']) if left['state'] == DONE else NOT_MEASURED
    text = re.sub(
        r'<!-- gpu: memory -->.*?<!-- end -->',
        lambda _: f'<!-- gpu: memory -->\n{report["environment"]["device"]}:\n\n{words}\n<!-- end -->',
        page.read_text(),
        flags=re.S,
    )
    write_text(page, text)


def failures(setting: Setting) -> list[str]:
    return [f'{part}/{name}' for part, name, left in results(setting) if left['state'] == FAILED]


def read_report(setting: Setting) -> dict:
    return json.loads((Path(setting.out) / 'report.json').read_text())
