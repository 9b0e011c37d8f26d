"""The tables of docs/gpu.md and README.md, from what the steps have found."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..results import markdown_table, write_text


def tables(report: dict) -> dict[str, str]:
    """A table for each kind of steps, which is the first word of their names, and one of kernels."""
    kinds: dict[str, list[dict]] = {}
    for name, found in report['steps'].items():
        result = found.get('result', {})
        rows = result.get('rows') or [dict(of=of, **one) for of, one in result.items() if isinstance(one, dict)]
        plain = {key: value for key, value in result.items() if not isinstance(value, (list, dict))}
        why = dict(why=found['why']) if 'why' in found else {}
        kinds.setdefault(name.partition('-')[0], []).extend(dict(step=name, **row, **why) for row in rows or [plain])
        kinds.setdefault('kernels', []).extend(dict(step=name, **row) for row in result.get('kernels', ()))
    return {kind: _table(rows) for kind, rows in kinds.items() if rows}


def _table(rows: Sequence[dict]) -> str:
    """In Markdown, of dicts, with numbers cut to what a reader wants."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [name.replace('_', ' ') for name in names]
    return markdown_table(head, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value) -> str:
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'
    return '' if value is None else str(value).replace('|', '/').replace('\n', ' ')


def fill_measured(page: Path, report: dict) -> None:
    """Put the tables into a page that has a place for them.

    Raises:
        ValueError: The report is of a CPU or of the smallest networks.
    """
    environment = report['environment']
    if report['tiny'] or report['device'] != 'cuda':
        raise ValueError(f'{page} takes figures of a GPU, but the report is of {environment["device"]}')
    source = ', '.join(f'{name} {environment[name]}' for name in ('driver', 'torch', 'commit'))
    for kind, words in tables(report).items():
        fill(page, kind, f'{environment["device"]}, {source}:\n\n{words}')


def fill(page: Path, kind: str, words: str) -> None:
    """Put words between ``<!-- gpu: KIND -->`` and ``<!-- end -->`` of a page, if it has these."""
    put = f'<!-- gpu: {kind} -->\n{words}\n<!-- end -->'
    text = re.sub(rf'<!-- gpu: {kind} -->.*?<!-- end -->', lambda _: put, page.read_text(), flags=re.S)
    write_text(page, text)
