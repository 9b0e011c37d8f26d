"""Results as JSON and text files, written atomically."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmstrip.utils.files import write_file


def as_json(value):
    """What comes back of a value that was written as JSON: its tuples are lists, for instance."""
    return json.loads(json.dumps(value))


def write_json(path: Path, value) -> None:
    """Write a JSON file, and the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{json.dumps(value, indent=1)}\n')


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown, of what has no line breaks and no bars."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
