"""The seam: what is available, what may run, and when."""

import warnings

import pytest
import torch
import torch.utils.flop_counter
from helpers import operators_of, python, small_backbone

from mmstrip import ops

native = pytest.mark.skipif('native' not in ops.available(), reason=ops.status())
X = torch.rand(2, 3, 64, 64)


def run(model=None):
    with torch.no_grad():
        return operators_of(lambda: (model or small_backbone().eval())(X))


@native
def test_contexts_nest_and_end():
    assert run()
    with ops.use('reference'):
        assert not run()
        with ops.use('native'):
            assert run()
        assert not run()
        with pytest.raises(KeyError), ops.use('native'):
            raise KeyError
        assert not run()
    assert run()


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="reference, recompute, native, but got 'fast'"), ops.use('fast'):
        pass


@native
def test_where_operators_step_aside():
    model = small_backbone().eval()
    assert not operators_of(lambda: model.double()(X.double()))
    model.float()
    with torch.autocast('cpu', torch.float16):
        assert not run(model)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not run(model)
    with torch.device('cpu'):  # a function mode: it may change any call
        assert not run(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None):
        assert not run(model)
    assert run(model)


@native
def test_one_changed_box_leaves_the_others_fast():
    model = small_backbone(arch=dict(embed_dims=16, depths=(1, 1, 1, 1)), out_indices=0).eval()
    everything = run(model)
    model.stages[0][0].channel_mixing.fc1.register_forward_hook(lambda *arguments: None)
    assert run(model) == everything - {'channel_mlp', 'depthwise'}


def test_without_operators_everything_works_and_says_so_once():
    """As on a machine without a compiler."""
    code = (
        'import warnings, torch; from mmstrip import ops; from mmstrip.models import StripMLP\n'
        'from mmstrip.ops import dispatch, extension\n'
        "dispatch._missing = 'not built for this PyTorch'\n"
        "assert ops.available() == ('reference', 'recompute')\n"
        "assert 'not built for this PyTorch' in ops.status()\n"
        "model = StripMLP('tiny-light', img_size=32)\n"
        'with warnings.catch_warnings(record=True) as seen:\n'
        "    warnings.simplefilter('always')\n"
        '    for _ in range(2): model(torch.rand(2, 3, 64, 64))[0].sum().backward()\n'
        "assert sum('not built for this PyTorch' in str(one.message) for one in seen) == 1, seen\n"
        'try:\n'
        "    with ops.use('native'): pass\n"
        'except RuntimeError as error:\n'
        "    assert 'not built' in str(error)\n"
        "    print('refused')\n"
    )
    result = python(code, env={'MMSTRIP_NATIVE': '1'})
    assert result.stdout.strip().endswith('refused'), result.stdout


def test_operators_are_here():
    """A library that stops compiling fails the suite; MMSTRIP_NATIVE=0 says that there is none to expect."""
    import os

    if os.environ.get('MMSTRIP_NATIVE') == '0':
        assert 'native' not in ops.available() and 'MMSTRIP_NATIVE' in ops.status()
    else:
        assert 'native' in ops.available(), ops.status()


def test_import_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert python('import mmstrip.models').stdout == ''
