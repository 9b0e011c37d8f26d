"""Networks alone: inference, dense tasks, memory, and what the card can do at all."""

from collections.abc import Sequence
from dataclasses import replace

from ..speed.measuring import Settings, allow_tf32, copy_gigabytes, matmul_gflops
from ..speed.rounds import run_benchmark
from ..speed.specs import Spec
from . import Setting
from .iterations import NETWORKS, SMALL, STRIP

_STRIP_FORMS = ((), ('deploy',), ('deploy', 'cudagraphs'), ('reference',))
_PEER_FORMS = ((), ('compile',), ('compile', 'cudagraphs'))


def spec(name: str, setting: Setting, *forms: str, **arguments) -> Spec:
    """A backbone in its best layout."""
    backbone, _, layout = (SMALL if setting.tiny else NETWORKS)[name]
    kind, own = backbone['type'], {key: value for key, value in backbone.items() if key != 'type'}
    forms = ('channels_last',) * (layout is not None) + forms
    label = ' '.join([name, *(f'@{form}' for form in forms), *(f'{key}={arguments[key]}' for key in arguments)])
    return Spec(label, kind if '.' in kind else f'mmpretrain.{kind}', {**own, **arguments}, forms)


def benchmark(
    setting: Setting, specs: Sequence[Spec], modes: Sequence[str], batch: int, shape=(224, 224)
) -> list[dict]:
    """A row for each model and mode in bfloat16, or with its error; CUDA graphs with CUDA alone.

    Raises:
        RuntimeError: Nothing ran.
    """
    allow_tf32(True)  # rounds that are long enough for a GPU's clock
    how = Settings(modes, batch, (shape,), 3, 'bfloat16', setting.device, 5, 2, round_seconds=0.1)
    if setting.tiny:
        how = replace(how, batch=2, shapes=((64, 64),), rounds=1, warmup=1, round_seconds=0.001, ceiling_side=64)
    specs = [one for one in specs if setting.cuda or 'cudagraphs' not in one.forms]
    report = run_benchmark(specs, how, skip_failing=True)
    if not report['results']:
        raise RuntimeError('; '.join(f'{label}: {words}' for label, words in report['failed'].items()))
    rows = [
        dict(
            model=one['label'],
            mode=one['mode'],
            image=' x '.join(map(str, one['shape'])),
            batch=how.batch,
            ms=round(1e3 * one['median'], 3),
            images_per_second=round(one['images_per_second'], 1),
            peak_mib=round(one['peak_mib']),
        )
        for one in report['results']
    ]
    return rows + [dict(model=label, error=words) for label, words in report['failed'].items()]


def inference(setting: Setting, name: str, batch: int) -> dict:
    """All forms of a network that there are for it."""
    specs = [spec(name, setting, *forms) for forms in (_STRIP_FORMS if name == STRIP else _PEER_FORMS)]
    return dict(rows=benchmark(setting, specs, ('inference',), batch))


def dense(setting: Setting, name: str) -> dict:
    """Two images of a detector, all maps given, in inference and training."""
    forms = _STRIP_FORMS[:1] if name == STRIP else _PEER_FORMS[:2]
    specs = [spec(name, setting, *one, out_indices=(0, 1, 2, 3)) for one in forms]
    return dict(rows=benchmark(setting, specs, ('inference', 'train'), 2, (800, 1216)))


def limits(setting: Setting) -> dict:
    """The rates of a copy and of a large product."""
    rate = max(matmul_gflops('bfloat16', setting.device, 64 if setting.tiny else None) for _ in range(3))
    return dict(copy_gb_per_second=round(copy_gigabytes(setting.device)), bfloat16_tflops=round(rate / 1e3, 1))


def memory(setting: Setting) -> dict:
    """Training steps by images, with checkpointing too; their peak is beyond the weights."""
    specs = [spec(STRIP, setting, with_cp=checkpointing) for checkpointing in (False, True)]
    return dict(rows=[row for batch in (64, 256) for row in benchmark(setting, specs, ('train',), batch)])
