"""mmstrip.accelerate(model, compile=True), what GPUs run: graphs are counted, and what is around a model stays."""

import copy
import pickle

import pytest
import torch
from helpers import ROOT, accelerator, behaviours, blocks, operators_of, randomise, small_backbone
from helpers.runs import call_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

import mmstrip
from mmstrip.models import StripMLP
from mmstrip.models.windows import run_in_windows
from mmstrip.ops import compiled, tables
from mmstrip.ops.fast import Fast

X = torch.rand(4, 3, 64, 64)


def as_it_is(graph, inputs):
    return graph


class Count:
    """A backend that counts graphs, and runs them as they are, or as another one does."""

    def __init__(self, backend=as_it_is):
        self.graphs, self.backend = 0, backend

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)

    def new(self) -> int:
        """Since the last call."""
        count, self.graphs = self.graphs, 0
        return count


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(compiled, 'BACKEND', Count())
    counters.clear()
    yield compiled.BACKEND
    assert not counters['graph_break']


def plain(depth: int = 1, **arguments) -> StripMLP:
    """A network of one stage."""
    arch = dict(embed_dims=8, depths=(depth, 1, 1, 1))
    return randomise(small_backbone(**dict(arch=arch, out_indices=0, drop_path_rate=0.0) | arguments))


def accelerated(*arguments, **keywords) -> StripMLP:
    return mmstrip.accelerate(plain(*arguments, **keywords), compile=True)


def double(x):
    return 2 * x


def reference_of(model: StripMLP) -> StripMLP:
    return mmstrip.restore(copy.deepcopy(model))


def train(model: nn.Module, x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    """Maps and gradients."""
    model.train().zero_grad()
    maps = model(x)
    sum(y.square().mean() for y in maps).backward()
    grads = {f'grad of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{f'map {i}': y.detach() for i, y in enumerate(maps)}, **grads}


def infer(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)[0]


def assert_close(got, expected, tolerance: float = 1e-4):
    """Within a part of the largest value."""
    got, expected = ({'map': y} if isinstance(y, torch.Tensor) else y for y in (got, expected))
    behaviours.assert_close(got, expected, tolerance)


class TestGraphs:
    """Nothing falls back to eager in silence. A stage has one graph for its blocks, one for the step before them."""

    def test_of_a_training(self, backend):
        model = accelerated(depth=3, drop_path_rate=0.2)
        train(model)
        assert backend.new() == 2
        for _ in range(3):  # accumulated gradients too
            train(model)
        assert backend.new() == 0
        infer(model)
        assert backend.new() == 2
        with torch.autocast('cpu', torch.bfloat16):
            train(model)
        assert backend.new() == 2
        for images in (3, 2, 3, 4):  # the last batch of an epoch
            train(model, X[:images])
        assert backend.new() == 3  # one more for the first block, whose map is a view of another one's memory

    def test_the_shape_decides_which_graph_computes(self, backend):
        """Not the order in which sizes came, so that a resumed training computes the same."""
        graphs = compiled.Graphs(dict(double=double))
        found = [graphs.graph_for(X[:size]) for size in (4, 3, 4, 2)]
        assert found == [graphs.fixed, graphs.any_size, graphs.fixed, graphs.any_size]
        assert all(torch.equal(graph(X[:size]), 2 * X[:size]) for graph, size in zip(found, (4, 3, 4, 2)))
        assert backend.new() == 2

    def test_pytorch_s_limit_is_raised_for_ours_alone(self, backend):
        config = torch._dynamo.config
        with config.patch(recompile_limit=1):
            for graphs in (compiled.Graphs(dict(double=double)), compiled.Graphs(dict(double=double))):
                for size in range(1, 5):
                    graphs.fixed(X[:size])
                assert backend.new() == 4
            assert config.recompile_limit == 1

    def test_one_for_all_sizes(self, backend):
        model = accelerated()
        reference = reference_of(model)
        train(model)
        backend.new()
        for size in ((96, 128), (128, 96), (96, 96), (160, 160), (128, 224), (100, 140), (75, 333), (352, 224)):
            x = torch.rand(2, 3, *size)
            assert_close(train(model, x), train(reference, x))
        train(model, torch.rand(3, 3, 160, 96))
        assert backend.new() == 2

    def test_checkpointed(self, backend):
        """Statistics count a batch once."""
        backend.backend = aot_eager  # as it is the one that tells of what it saves
        model = accelerated(with_cp=True)
        reference = reference_of(model)
        for new in (3, 0):  # one graph more: the second time, statistics stand still
            assert_close(train(model), train(reference))
            assert backend.new() == new
        assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))

    def test_frozen_stages(self, backend):
        model = accelerated(out_indices=(0, 1), frozen_stages=1)
        reference = reference_of(model)
        for new in (4, 0):
            assert_close(train(model), train(reference))
            assert backend.new() == new

    def test_synchronised_norms(self, backend, monkeypatch):
        """In one process. In several, the trial of one whose compiler fails would leave the others waiting."""
        model = mmstrip.accelerate(nn.SyncBatchNorm.convert_sync_batchnorm(plain()), compile=True)
        assert_close(train(model), train(reference_of(model)))
        assert backend.new() == 2
        monkeypatch.setattr(accelerator, 'get_world_size', lambda: 2)
        said = accelerator.change_classes(model, compile=True)
        assert said.startswith('the reference runs, as SyncBN is not compiled') and not is_compiled(model)
        assert accelerator.change_classes(plain(), compile=True).startswith('1 of 1 blocks')

    def test_padding_ignored(self, backend):
        model, x = accelerated(ignore_padding=True), X.clone()
        x[1, :, 40:] = 0
        assert_close(infer(model, x), infer(reference_of(model), x))
        assert backend.new() == 2


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    extent=st.tuples(st.sampled_from([1, 4, 7]), st.sampled_from([2, 5])),
)
@settings(max_examples=50, deadline=None)
def test_windows_by_tables(size, extent):
    x = torch.rand(2, 3, *size)
    tables.given.tables = [tables.tables_of(dim, x.shape[dim], side, x.device) for dim, side in zip((2, 3), extent)]
    try:
        found = tables.run_in_windows(lambda windows: windows.cumsum(2), x, extent)
    finally:
        tables.given.tables = None
    torch.testing.assert_close(found, run_in_windows(lambda windows: windows.cumsum(2), x, extent))


class TestTheTrial:
    def test_nothing_changes(self, backend):
        model = accelerated(drop_path_rate=0.5).train()
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        compiled._networks[model].try_once(model, X)
        assert backend.new() == 2
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        train(model)
        assert backend.new() == 0

    def test_a_compiler_that_fails(self, monkeypatch):
        """On the way back, say: the reference runs from the first step on, and one line says why."""

        def fail(graph, inputs):
            raise OSError('no space left\non this device')

        lines = []
        monkeypatch.setattr(compiled, 'BACKEND', fail)
        monkeypatch.setattr(compiled, 'print_log', lambda line, logger: lines.append(line))
        model = accelerated()
        reference = reference_of(model)
        assert_close(train(model), train(reference), 0)
        infer(model)
        assert len(lines) == 1 and 'no space left' in lines[0]
        assert lines[0].startswith('Strip-MLP: the reference runs, as compiling failed: BackendCompilerFailed: ')
        assert 'compiling failed' in accelerator.change_classes(model, compile=True)

    def test_an_older_pytorch(self, monkeypatch):
        monkeypatch.setattr(accelerator, 'COMPILES', (99, 1))
        why = f'compiling takes PyTorch 99.1, and this is {torch.__version__}'
        assert accelerator.change_classes(plain(), compile=True) == f'the reference runs, as {why}'
        assert mmstrip.ops.status().endswith(f'; GPUs run the reference, as {why}')


@pytest.fixture(scope='module')
def shared():
    """Compiled for inference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, 'BACKEND', Count())
        model = accelerated().eval()
        infer(model)
        model.count = compiled.BACKEND
        yield model


def is_compiled(model: StripMLP) -> bool:
    return any(isinstance(module, Fast) for module in model.modules())


class TestAroundIt:
    def test_it_says_what_it_does(self):
        said = accelerator.change_classes(plain(depth=2), compile=True)
        assert said == '2 of 2 blocks, and the steps between stages, are compiled in the first forward'
        assert accelerator.change_classes(plain().stages, compile=True) == (
            'the reference runs, as only whole networks are compiled'
        )

    def test_networks_of_fsdp2_run_the_reference(self, backend, one_process):
        """Accelerated before or after: a line says so, and training goes on."""
        mesh = torch.distributed.init_device_mesh('cpu', (1,))
        before, after = accelerated(), plain()
        expected = [train(reference_of(model))['map 0'] for model in (before, after)]
        for model in (before, after):
            fully_shard(model.stages[0][0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        said = accelerator.change_classes(after, compile=True)
        assert said == 'the reference runs, as only StripMLP itself is compiled, and this is a FSDPStripMLP'
        for model, maps in zip((before, after), expected):
            assert_close(train(model)['map 0'], maps)
        assert 'FSDP does not support deepcopy' in compiled._networks[before].error
        assert backend.new() == 0

    def test_nothing_but_classes_changes(self, backend):
        model = plain().eval()
        state, before = model.state_dict(), {module: dict(vars(module)) for module in model.modules()}
        mmstrip.accelerate(model, compile=True)
        infer(model)
        assert model.state_dict().keys() == state.keys() and isinstance(model, StripMLP)
        assert all(vars(module) == attributes for module, attributes in before.items())
        mmstrip.restore(model)
        assert not is_compiled(model)
        backend.new()
        infer(model)
        assert backend.new() == 0

    def test_the_call_again_compiles_nothing_again(self, shared):
        mmstrip.accelerate(shared, compile=True)
        infer(shared)
        shared.count.new()
        mmstrip.accelerate(shared, compile=True)
        infer(shared)
        assert shared.count.new() == 0

    def test_from_operators_to_graphs_and_back(self):
        model = mmstrip.accelerate(plain())
        mmstrip.accelerate(model, compile=True)
        kinds = {type(module) for module in model.modules()}
        assert kinds & set(compiled.CLASSES) and not kinds & set(accelerator.CLASSES)
        mmstrip.accelerate(model)
        assert not {type(module) for module in model.modules()} & set(compiled.CLASSES)

    def test_pickles_are_of_the_reference(self, shared):
        pickled = pickle.dumps(shared)
        assert b'mmstrip.ops' not in pickled
        assert_close(infer(pickle.loads(pickled)), infer(shared))

    def test_copies_and_averages(self, shared):
        """They run the reference until the call; weights swapped in by .data.copy_ count at once."""
        expected = infer(shared)
        shared.count.new()
        averaged = ExponentialMovingAverage(shared, momentum=0.5).module
        assert isinstance(averaged, StripMLP)
        assert_close(infer(averaged), expected)
        for parameter in averaged.parameters():
            parameter.data.mul_(1.1)
        mine = copy.deepcopy(shared.state_dict())
        for parameter, other in zip(shared.parameters(), averaged.parameters()):
            parameter.data.copy_(other.data)
        assert_close(infer(shared), infer(averaged))
        shared.load_state_dict(mine)
        assert_close(infer(shared), expected)
        assert shared.count.new() == 0

    @pytest.mark.parametrize('where', ['stages.0.0.channel_mixing.fc1', 'patch_embed'])
    def test_hooks_inside_fire(self, shared, where):
        """A graph would not see them."""
        seen = []
        with shared.get_submodule(where).register_forward_hook(lambda *arguments: seen.append(1)):
            assert_close(infer(shared), infer(reference_of(shared)))
            if where != 'patch_embed':
                said = accelerator.change_classes(shared, compile=True)
                assert said.startswith('0 of 1 blocks') and said.endswith('stages.0.0 is wrapped or hooked')
        assert len(seen) == 2  # of the copy too
        shared.count.new()
        infer(shared)
        assert len(seen) == 2 and shared.count.new() == 0

    def test_the_deploy_form(self, backend):
        model = accelerated().eval()
        model.switch_to_deploy()
        assert_close(infer(model), infer(reference_of(model)))
        assert backend.new() == 2

    def test_exporters_compilers_and_transforms_see_the_reference(self, shared):
        expected = infer(reference_of(shared))
        shared.count.new()
        for exported in (
            torch.export.export(shared, (X,), strict=False).module(),
            torch.jit.trace(shared, X, check_trace=False),
            torch.compile(shared, backend='eager', fullgraph=True),
            torch.func.vmap(lambda x: shared(x[None])[0][0]),
        ):
            with torch.no_grad():
                found = exported(X)
            assert_close(found if isinstance(found, torch.Tensor) else found[0], expected)
        assert shared.count.new() == 0

    def test_other_parameters(self, shared):
        doubled = {name: 2 * value for name, value in shared.named_parameters()}
        found = torch.func.functional_call(shared, doubled, X)[0]
        assert_close(found, torch.func.functional_call(reference_of(shared), doubled, X)[0])

    def test_operators_of_ours_stay_out(self, shared):
        assert not operators_of(lambda: infer(shared))


RANKS = """
import copy
from functools import partial
from torch import nn
from mmstrip.models import StripMLP
from mmstrip.ops import compiled

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = StripMLP(dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32, out_indices=0)
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.backbone(images)[0].mean((2, 3)))

mmstrip.accelerate = partial(mmstrip.accelerate, compile=True)
rank = int(os.environ['RANK'])
for failing in (None, 1):
    def backend(graph, inputs):
        if rank == failing:
            raise OSError('no space left')
        return graph
    compiled.BACKEND = backend
    network = Classifier()
    train(network, [(torch.rand(2, 3, 32, 32), torch.tensor([0, rank]))] * 2)
    weights = [torch.empty_like(network.head.weight.data) for _ in range(2)]
    torch.distributed.all_gather(weights, network.head.weight.data)
    said = f'RANK {rank} {compiled._networks[network.backbone].error} {torch.equal(*weights)}.\\n'
    os.write(1, said.encode())  # in one piece
    torch.distributed.init_process_group = lambda: None  # one group for both
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_the_loop_of_the_page_in_two_processes(tmp_path):
    """And where compiling fails in one of them, the reference runs in both."""
    (loop,) = (block for block in blocks(ROOT / 'docs/gpu.md', 'python') if 'DistributedDataParallel' in block)
    (tmp_path / 'loop.py').write_text(loop + RANKS)
    printed = call_ranks(tmp_path / 'loop.py', folder=tmp_path)
    said = sorted(line for line in printed.splitlines() if line.startswith('RANK'))
    assert {'RANK 0 None True.', 'RANK 1 None True.', 'RANK 0 it failed in another process True.'} < set(said), printed
    assert any(line.startswith('RANK 1 BackendCompilerFailed: ') and line.endswith('True.') for line in said)


def test_inductor_and_a_training_that_is_resumed():
    """As the reference to rounding; resumed after a step, bit for bit the one that went on."""

    def run(model: nn.Module, steps: list[int]) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            train(model, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
        return model

    model = accelerated()
    reference = run(reference_of(model), [0, 1])
    state = copy.deepcopy(run(model, [0]).state_dict())
    run(model, [1])
    resumed = plain()
    resumed.load_state_dict(state)
    run(mmstrip.accelerate(resumed, compile=True), [1])
    assert compiled._networks[model].error is None and compiled._networks[resumed].error is None
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
    assert_close(model.state_dict(), reference.state_dict())
