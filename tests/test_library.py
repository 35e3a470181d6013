"""The choice of a backend, and where GPU backends launch."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import plum.ops  # noqa: F401  registers the ops
from plum import _library, _native
from plum._library import OPS, Backend
from plum.errors import BackendUnavailable, InvalidArgument
from plum.trie import SidTrie


@pytest.mark.parametrize("name", sorted(OPS))
def test_gpu_backends_launch_on_the_device_of_their_first_tensor(monkeypatch, name):
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    for backend in OPS[name].backends.values():
        if backend.device != "cuda":
            continue
        spy = Backend(backend.name, "cuda", lambda *args: seen.append(list(current)), lambda: None)
        monkeypatch.setitem(OPS[name].backends, backend.name, spy)
        there = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
        OPS[name](there, backend=backend.name)
        assert seen.pop() == [torch.device("cuda:1")]
        monkeypatch.setenv("PLUM_GPU_KERNELS", "on")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        _library._on_a_gpu(name, [spy], OPS[name].reference)(there)
        assert seen.pop() == [torch.device("cuda:1")]
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if backend.name == "triton":
            OPS[name](torch.zeros(1), backend=backend.name)
            assert seen.pop() == [], "tensors of the interpreter are on the CPU"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendUnavailable, match="it takes cuda tensors, not such on cpu"):
            OPS[name](torch.zeros(1), backend=backend.name)


def gpu(monkeypatch, capability, setting="auto", *backends):
    """What the automatic choice takes for a number, on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("PLUM_GPU_KERNELS", setting)
    run = _library._on_a_gpu("an_op", backends, lambda tensor, number: "reference")
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    return lambda number: run(tensor, number)


def test_kernels_that_are_not_installed_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plum.kernels" else find(name)
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "pip install -e" in _native.missing_triton()


def backend(name, missing=None, most=100):
    return Backend(
        name, "cuda", lambda tensor, number: name, lambda: missing, lambda _, n: n <= most
    )


def test_the_first_gpu_backend_that_runs_and_fits_is_taken(monkeypatch):
    run = gpu(monkeypatch, (9, 0), "auto", backend("cuda", most=10), backend("triton"))
    assert [run(number) for number in (1, 10, 11, 100)] == ["cuda", "cuda", "triton", "triton"]
    with pytest.warns(match="cuda: it does not take these arguments; triton: it does not"):
        assert run(101) == "reference"
    absent = backend("cuda", "built without CUDA")
    assert gpu(monkeypatch, (9, 0), "auto", absent, backend("triton"))(1) == "triton"


@pytest.mark.parametrize(
    ("capability", "setting", "taken", "reason"),
    [
        ((9, 0), "auto", "triton", None),
        ((8, 0), "auto", "reference", "has not run on compute capability 8.0 yet"),
        ((8, 0), "on", "triton", None),
        ((9, 0), "off", "reference", None),  # as asked for
    ],
)
def test_gpus_that_no_kernel_has_run_on_take_the_reference(
    monkeypatch, capability, setting, taken, reason
):
    run = gpu(monkeypatch, capability, setting, backend("triton"))
    warned = contextlib.nullcontext() if reason is None else pytest.warns(match=reason)
    with warned:
        assert run(1) == taken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(2) == taken, "the warning comes once"


def test_a_kernel_that_no_gpu_has_run_is_no_default(monkeypatch):
    new = Backend("triton", "cuda", lambda *args: "triton", lambda: None, proven=())
    with pytest.warns(match="has not run on compute capability 9.0 yet"):
        assert gpu(monkeypatch, (9, 0), "auto", new)(1) == "reference"
    assert gpu(monkeypatch, (9, 0), "on", new)(1) == "triton"


def test_other_settings_and_rocm(monkeypatch):
    with pytest.raises(InvalidArgument, match="PLUM_GPU_KERNELS: expected auto, on or off, got"):
        gpu(monkeypatch, (9, 0), "yes", backend("triton"))(1)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.warns(match="ROCm"):
        assert gpu(monkeypatch, (9, 4), "auto", backend("triton"))(1) == "reference"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real 90-real 100-real 120", 90, True),
        ("80-real 90-real 100-real 120", 86, True),
        ("80-real 90-real 100-real 120", 75, False),
        ("80-real 90-real 100-real 120", 121, True),
        ("80-real 90", 100, True),
        ("90-real", 100, False),
        ("90-real", 80, False),
        ("90a-real", 90, True),
        ("90a", 100, False),
        ("100f-real", 103, True),
        ("100f", 120, False),
        ("103f", 100, False),
        ("100-virtual", 120, True),
        ("100-virtual", 90, False),
        ("native", 90, True),
        ("", 90, False),
    ],
)
def test_cuda_code_runs_on_its_own_major_version_and_ptx_on_later_ones(
    architectures, capability, runs
):
    assert _native.runs_on(architectures, capability) is runs


def test_a_backend_is_asked_about_the_gpu_of_the_tensors(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(torch.device(index).index)
        yield
        current.pop()

    only_on_one = Backend(
        "cuda", "cuda", lambda tensor: "cuda", lambda: None if current[-1] == 1 else "too old"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setenv("PLUM_GPU_KERNELS", "on")
    run = _library._on_a_gpu("an_op", [only_on_one], lambda tensor: "reference")
    first, second = (
        SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)
    )
    assert run(second) == "cuda"
    with pytest.warns(match="too old"):
        assert run(first) == "reference"


TRIE = SidTrie.from_codes([[0, 1], [0, 3], [2, 0]])
STATES = TRIE.root_states(6).view(3, 2, 2).transpose(0, 1)
ZEROS = torch.zeros_like(STATES[..., 0])
BOOK = torch.arange(12.0).view(3, 4).T
BEAMS = BOOK[None, :2], BOOK[:1, :2], STATES[:1, :2]


CASES = [
    ("code_usage", (ZEROS, [4, 4, 4], True)),
    ("trie_advance", (STATES, ZEROS, list(TRIE.index), 0, ZEROS)),
    ("trie_walk", (ZEROS.T[:, :0], STATES[0].T.contiguous().T, list(TRIE.index))),
    ("forced_tail", (STATES, list(TRIE.index), 1)),
    ("trie_beam_step", (*BEAMS, list(TRIE.index), 0, None, [0, 0], 3, False, [], None)),
    ("revive_codes", (BOOK, BOOK[:, 0] > 1, BOOK, BOOK[:, 0])),
    ("revive_codes", (BOOK, BOOK[:, 0] > 1, BOOK[:0], BOOK[:0, 0])),
    ("residual_quantize", (BOOK.half(), BOOK, [2, 2], False, None)),
    ("residual_quantize", (BOOK, BOOK, [2, 2], True, None)),
]


def by_backend(name, args):
    """The tensors that each backend gives that can run here."""
    for backend in ["reference", *OPS[name].backends]:
        with contextlib.suppress(BackendUnavailable):
            yield backend, pytree.tree_leaves(OPS[name](*args, backend=backend))


def counted(codes):
    """An op of two codes a level, counted over levels."""
    return OPS["code_usage"](codes, [2, 2], True)


CODES = torch.tensor([[0, 1], [1, 1], [1, 1]])
COUNTS = [1, 2, 0, 3]


def test_plain_tensors_on_a_cpu_go_past_the_dispatcher(monkeypatch):
    monkeypatch.setattr(OPS["code_usage"], "_overload", None)
    assert counted(CODES).tolist() == COUNTS
    with torch.inference_mode(), torch.autocast("cpu"):
        assert counted(CODES).tolist() == COUNTS
    for other in (CODES.to("meta"), CODES.as_subclass(type("Mine", (torch.Tensor,), {}))):
        with pytest.raises(TypeError, match="NoneType"):
            counted(other)


class Watcher:
    """A mode that writes down what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def watch(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watch(Watcher, TorchDispatchMode):
    __torch_dispatch__ = Watcher.watch


class Functions(Watcher, TorchFunctionMode):
    __torch_function__ = Watcher.watch


def test_what_traces_watches_or_transforms_ops_still_sees_them():
    with Watch() as watch:
        assert counted(CODES).tolist() == COUNTS
    assert watch.seen[0] == "plum.code_usage.default"
    for before in (False, True):
        traced = make_fx(counted, pre_dispatch=before)(CODES).code
        assert "plum.code_usage.default" in traced
    with Functions() as functions:
        counted(CODES)
    assert "plum.code_usage.default" in functions.seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert "plum::code_usage" in str(torch.jit.trace(counted, (CODES,)).graph)
    with torch.profiler.profile() as profile:
        counted(CODES)
    assert "plum::code_usage" in {event.key for event in profile.key_averages()}
    assert torch.func.functionalize(counted)(CODES).tolist() == COUNTS


def test_a_trie_of_fake_tensors_is_refused_and_not_read():
    with FakeTensorMode() as mode:
        index = [mode.from_tensor(tensor) for tensor in TRIE.index]
    with warnings.catch_warnings(), pytest.raises(AssertionError):
        warnings.simplefilter("ignore", UserWarning)
        OPS["forced_tail"](STATES, index, 0)


def on_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize(("name", "args"), CASES)
def test_every_backend_gives_the_layout_that_graphs_are_made_for(name, args):
    fake = getattr(torch.ops.plum, name)(*pytree.tree_map_only(torch.Tensor, on_meta, args))
    for backend, found in by_backend(name, args):
        for one, expected in zip(found, pytree.tree_leaves(fake), strict=True):
            layout = one.dtype, one.shape, one.stride()
            assert layout == (expected.dtype, expected.shape, expected.stride()), backend


@pytest.mark.parametrize(("name", "args"), CASES)
def test_defaults_of_torch_do_not_matter(name, args):
    expected = OPS[name].reference(*args)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = list(by_backend(name, args))
    finally:
        torch.set_default_dtype(torch.float32)
    for _, one in found:
        torch.testing.assert_close(one, pytree.tree_leaves(expected))


def test_a_native_module_of_other_bindings_is_out_of_date(tmp_path):
    bindings = Path(__file__).parents[1] / "csrc" / "bindings" / "module.cpp"
    assert not _native.outdated(_native._C.bindings, bindings)
    newer = tmp_path / "module.cpp"
    newer.write_bytes(bindings.read_bytes() + b"\n")
    assert _native.outdated(_native._C.bindings, newer)
    assert _native.outdated("unknown", bindings)
    # An installed wheel has no sources, and a build of one's own may not tell.
    assert not _native.outdated(_native._C.bindings, tmp_path / "nothing.cpp")
    assert not _native.outdated("", newer)
