"""Run the code of a notebook, in its folder: python notebook.py NOTEBOOK."""

import json
import os
import sys
from pathlib import Path

import matplotlib

if __name__ == '__main__':
    matplotlib.use('Agg')
    path = Path(sys.argv[1])
    os.chdir(path.parent)
    names = {}
    for number, cell in enumerate(json.loads(path.read_text())['cells']):
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), f'{path.name}, cell {number}', 'exec'), names)
