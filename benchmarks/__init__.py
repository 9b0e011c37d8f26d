"""What measures the project: its speed, the evidence of docs/results.md and the report on GPUs.

Run from the repository's folder, by ``make`` or ``python -m benchmarks.NAME``; no part of the installed package.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
