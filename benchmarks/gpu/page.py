"""Rows that steps find, and the tables made of them in docs/gpu.md and README.md."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path

from ..results import markdown_table, write_text


def attempt(find: Callable[[], dict], **about) -> dict:
    """A row: what it is about and what is found, or the 'error'."""
    try:
        return about | find()
    except Exception as error:  # of any device, compiler or toolbox
        traceback.print_exc()
        return about | dict(error=f'{type(error).__name__}: {str(error).strip()[:500]}')


def tables(report: dict) -> dict[str, str]:
    """A table in Markdown for each kind of steps, the first word of their names, and one of kernels."""
    kinds: dict[str, list[dict]] = {}
    for name, step in report['steps'].items():
        for row in step['rows']:
            row = dict(step=name, **row)
            kinds.setdefault('kernels', []).extend(dict(step=name, **kernel) for kernel in row.pop('kernels', ()))
            kinds.setdefault(name.partition('-')[0], []).append(row)
    return {kind: _table(rows) for kind, rows in kinds.items() if rows}


def _table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [name.replace('_', ' ') for name in names]
    return markdown_table(head, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value) -> str:
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 100 else f'{value:,.0f}'
    return '' if value is None else str(value).replace('|', '/').replace('\n', ' ')


def fill_measured(page: Path, report: dict) -> None:
    """Put the tables of a report into a page.

    Raises:
        ValueError: The report is of a dry run.
    """
    about = report['environment']
    if report['dry']:
        raise ValueError(f'{page} takes figures of a GPU, but the report is of {about["device"]}')
    source = ', '.join([about['device'], *(f'{name} {about[name]}' for name in ('driver', 'torch', 'commit'))])
    for kind, table in tables(report).items():
        fill(page, kind, f'{source}:\n\n{table}')


def fill(page: Path, kind: str, words: str) -> None:
    """Put words between ``<!-- gpu: KIND -->`` and ``<!-- end -->`` of a page, if it has these."""
    put = f'<!-- gpu: {kind} -->\n{words}\n<!-- end -->'
    text = re.sub(rf'<!-- gpu: {kind} -->.*?<!-- end -->', lambda _: put, page.read_text(), flags=re.S)
    write_text(page, text)
