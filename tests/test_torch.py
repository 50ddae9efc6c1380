"""Private names of torch: one module knows them, and says or does something right where a torch lacks them."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak
from polyak import _torch
from polyak.errors import PolyakError, StructureError

SOURCE = Path(polyak.__file__).parent
TREES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
# Frameworks' own modules, and where the command line meets click.
FOREIGN = ("integrations/", "cli/")
# Python's own, on named tuples and frames.
PYTHONS = {"_fields", "_replace", "_asdict", "_getframe"}
# Names of torch's that polyak has for attributes of its own too.
TORCHS = {"_parameters", "_buffers", "_modules", "_version"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def own_names() -> frozenset[str]:
    """Every private name that polyak itself gives to something."""
    names: set[str] = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                names.add(node.attr)
    return frozenset(names)


def modules_of(tree: ast.AST) -> dict[str, str]:
    """To each name that a file imports, the module it is or comes from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def private_uses(tree: ast.AST) -> set[str]:
    """Private names that a file imports from torch, or takes from torch or from what is not polyak's."""
    modules, own, found = modules_of(tree), own_names(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found |= {a.name for a in node.names if a.name.startswith("torch.")}
            case ast.ImportFrom(module=str(module)) if module.startswith("torch"):
                found |= {f"{module}.{a.name}" for a in node.names}
            case ast.Attribute(value=ast.Name(id=name)) if modules.get(name, "").startswith("torch"):
                found.add(f"{modules[name]}.{node.attr}")
            case ast.Attribute(value=value, attr=attr) if is_private(attr):
                on_self = isinstance(value, ast.Name) and value.id in ("self", "cls")
                if attr not in own or (attr in TORCHS and not on_self):
                    found.add(attr)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(str(attr)), *_]):
                found |= {attr} - own
            case ast.Call(func=ast.Name(id="attrgetter"), args=[ast.Constant(str(attr))]):
                found.add(attr)
    return {name for name in found if any(map(is_private, name.split(".")))} - PYTHONS


@pytest.mark.parametrize(
    "path", sorted(path for path in TREES if path != "_torch.py" and not path.startswith(FOREIGN))
)
def test_no_other_file_uses_a_private_name_of_torch(path: str) -> None:
    assert not private_uses(TREES[path])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch\ntorch._foreach_lerp_(a, b, 1)", "torch._foreach_lerp_"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._subclasses import FakeTensorMode", "torch._subclasses.FakeTensorMode"),
        ("from torch import nn\nnn._reduction", "torch.nn._reduction"),
        ("def f(tensor):\n    return tensor._version", "_version"),
        ("def f(module):\n    return module._non_persistent_buffers_set", "_non_persistent_buffers_set"),
        ("getattr(storage, '_checkpoint_offset', None)", "_checkpoint_offset"),
    ],
)
def test_a_private_name_is_found(text: str, found: str) -> None:
    assert private_uses(ast.parse(text)) == {found}


# Other torches: this one, with names taken away.


def reloaded():
    """The module as it comes out under the torch of now; the one in use stays as it is."""
    spec = importlib.util.spec_from_file_location("polyak._torch_of_another_day", _torch.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((3,), (2, 4), (), (0, 2))]


OPERATIONS = {
    "add_": (tensors(seed=1),),
    "addcmul_": (tensors(seed=1), tensors(seed=2), [0.5, -1.0, 2.0, 3.0]),
    "copy_": (tensors(torch.float32, seed=1),),
    "lerp_": (tensors(seed=1), 0.25),
    "mul": ([0.5, -1.0, 2.0, 3.0],),
    "mul_": ([0.5, -1.0, 2.0, 3.0],),
    "norm": (2,),
    "sub_": (tensors(seed=1),),
    "zero_": (),
}


@pytest.mark.parametrize(
    "name", [n.removeprefix("foreach_") for n in _torch.__all__ if n.startswith("foreach_")]
)
def test_without_an_operation_on_many_tensors_each_is_worked_on(name, monkeypatch):
    monkeypatch.delattr(torch, f"_foreach_{name}")
    slow, fast = getattr(reloaded(), f"foreach_{name}"), getattr(_torch, f"foreach_{name}")
    assert slow is not fast
    ours, theirs = tensors(), tensors()
    results = slow(ours, *OPERATIONS[name]), fast(theirs, *OPERATIONS[name])
    if not name.endswith("_"):
        ours, theirs = results
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-15, atol=0)
    if name.endswith("_"):
        assert all(a is b for a, b in zip(results[0], ours, strict=True))


def test_lists_of_unequal_length_are_refused_tensor_by_tensor_too(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_copy_")
    with pytest.raises(ValueError, match="shorter"):
        reloaded().foreach_copy_(tensors(), tensors()[:2])


def test_an_average_is_the_same_without_operations_on_many_tensors(monkeypatch):
    def averaged():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 200))
        average = polyak.Average(model, polyak.EMA(decay=0.9), compensated=True)
        for _ in range(4):
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape))
            average.update()
        return average.named_tensors()

    expected = averaged()
    for name in OPERATIONS:
        monkeypatch.delattr(torch, f"_foreach_{name}")
    slow = reloaded()
    for name in OPERATIONS:
        monkeypatch.setattr(_torch, f"foreach_{name}", getattr(slow, f"foreach_{name}"))
    torch.testing.assert_close(averaged(), expected)


def test_tensors_made_in_inference_mode_have_no_versions():
    with torch.inference_mode():
        uncounted = torch.zeros(1)
    counted = torch.zeros(1)
    before = _torch.versions([counted])[0]
    counted.add_(1)
    assert _torch.versions([uncounted, counted]) == [-1, before + 1]


def test_without_the_class_of_all_batchnorms_torchs_own_are_known(monkeypatch):
    monkeypatch.delattr(nn.modules.batchnorm, "_BatchNorm")
    layers = [
        nn.BatchNorm1d(1),
        nn.BatchNorm2d(1),
        nn.BatchNorm3d(1),
        nn.SyncBatchNorm(1),
        nn.LazyBatchNorm1d(),
    ]
    assert all(map(reloaded().is_batchnorm, layers))
    assert not reloaded().is_batchnorm(nn.InstanceNorm1d(1))


def test_without_the_decorator_that_loads_nothing_the_public_one_serves(monkeypatch):
    monkeypatch.delattr(torch, "_disable_dynamo")
    assert reloaded().uncompiled is torch.compiler.disable


def test_a_compiler_of_another_name_is_told_to_stand_back_always(monkeypatch):
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    monkeypatch.delitem(_torch.sys.modules, "torch._dynamo", raising=False)
    _torch.without_graphs()
    assert not stances
    monkeypatch.setattr(_torch, "find_spec", lambda name: None)
    _torch.without_graphs()
    assert stances == ["force_eager"]


def test_a_module_that_keeps_its_tensors_elsewhere_is_refused_on_import(monkeypatch):
    class Module:
        def __init__(self):
            self._parameters = {}

    monkeypatch.setattr(nn, "Module", Module)
    with pytest.raises(PolyakError, match=r"no .*Module\._buffers, without which .* use a newer polyak"):
        reloaded()


def test_an_optimizer_that_keeps_its_hooks_elsewhere_is_refused_at_once(monkeypatch):
    inner = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    set_up = torch.optim.Optimizer.__setstate__

    def otherwise(self, state):
        set_up(self, state)
        self.__dict__.pop("_optimizer_state_dict_post_hooks", None)

    monkeypatch.setattr(torch.optim.Optimizer, "__setstate__", otherwise)
    with pytest.raises(PolyakError, match=r"no SWA\._optimizer_state_dict_post_hooks"):
        polyak.optim.SWA(inner)


@pytest.mark.parametrize("home", ["torch._dynamo.eval_frame", "torch.distributed.fsdp.wrap"])
def test_a_wrapper_of_torchs_with_a_new_name_for_what_it_wraps_is_refused(home):
    class Wrapper(nn.Module):
        __module__ = home

        def __init__(self):
            super().__init__()
            self._inner = nn.Linear(1, 1)

    with pytest.raises(StructureError, match=r"Wrapper of torch .* keeps what it wraps as '_inner'"):
        polyak.Average(nn.Sequential(Wrapper()), polyak.Uniform())


def test_a_users_own_private_child_keeps_its_name():
    model = nn.Module()
    model._inner = nn.Linear(1, 1)
    assert list(polyak.Average(model, polyak.Uniform())._binding.names) == ["_inner.weight", "_inner.bias"]


@pytest.mark.parametrize(("error", "widest"), [(TypeError, torch.float32), (RuntimeError, torch.float32)])
def test_a_device_without_float64_is_found_by_trying(error, widest, monkeypatch):
    def refuse(*args, **kwargs):
        raise error("no float64 here")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert _torch.widest_float.__wrapped__(torch.device("cpu")) == widest


def test_a_full_device_is_not_taken_for_one_without_float64(monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        _torch.widest_float.__wrapped__(torch.device("cpu"))


def test_models_whose_parameters_are_nowhere_whole_are_refused_by_name():
    """FSDP1 flattens, ZeRO-3 takes apart.

    DeepSpeed is not among what tests need, so its mark stands for it; 0.19.8's own ``zero.Init`` was refused on a CPU.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    flattened = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flattened)
    with pytest.raises(StructureError, match=r"\(FSDP1\) flattens .* polyak\.average_checkpoints"):
        polyak.Average(nn.Sequential(flattened), polyak.Uniform())
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(
        StructureError, match=r"ZeRO-3 leaves no parameter whole .* polyak\.average_checkpoints"
    ):
        polyak.Average(nn.Sequential(model), polyak.Uniform())
