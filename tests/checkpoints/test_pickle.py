"""What else lies in torch files: harmless objects are read as data, others only when allowed, and none is run."""

import datetime
import decimal
import fractions
import json
import os
import pathlib
import pickle
import pickletools
import sys
import types
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from polyak import checkpoints
from polyak.checkpoints._pickle import HARMLESS, Record, _operations, stand_ins, unpickle
from polyak.errors import CheckpointError, OptionError

WEIGHT = torch.tensor([1.0, 2.0])
FORMS = {"zip": {}, "protocol 5": {"pickle_protocol": 5}, "legacy": {"_use_new_zipfile_serialization": False}}
HARMLESS_OBJECTS = {
    "Namespace": Namespace(lr=0.1, step=99, model="vit"),
    "SimpleNamespace": types.SimpleNamespace(step=99),
    "numpy float": np.float64(0.5),
    "numpy text": np.str_("a"),
    "numpy date": np.datetime64("2024-05-01"),
    "numpy bool": np.bool_(True),
    "numpy array": np.arange(3),
    "numpy records": np.zeros(2, dtype=[("a", "i4")]),
    "numpy dtype": np.dtype("float32"),
    "numpy type": np.float32,
    "numpy state": np.random.RandomState(0).get_state(),
    "Path": pathlib.Path("runs/a"),
    "Windows path": pathlib.PureWindowsPath("runs/a"),
    "datetime": datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "date": datetime.date(2024, 5, 1),
    "time": datetime.time(1),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=7),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "slice": slice(1, 2),
    "range": range(3),
    "complex": 1j,
    "bytearray": bytearray(b"a"),
    "type": dict,
}
CONTENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.just(OrderedDict(a=pathlib.Path("a")))
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("form", FORMS)
def test_harmless_objects_are_left_out_and_never_made(tmp_path, form):
    torch.save(
        {"model": {"w": WEIGHT}, "global_step": np.int64(7)} | HARMLESS_OBJECTS,
        tmp_path / "x.pt",
        **FORMS[form],
    )
    with checkpoints.open(tmp_path / "x.pt") as opened:
        assert set(opened.ignored) == {"global_step", *HARMLESS_OBJECTS}
        assert (opened.step, opened.step_key, opened.key) == (7, "global_step", "model")
        assert opened.metadata["numpy float"] == "0.5"
        assert torch.equal(opened.read("w"), WEIGHT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HARMLESS_OBJECTS)
def test_every_harmless_object_alone(tmp_path, form, kind):
    torch.save({"w": WEIGHT, "x": HARMLESS_OBJECTS[kind]}, tmp_path / "x.pt", **FORMS[form])
    assert list(checkpoints.open(tmp_path / "x.pt").tensors) == ["w"]


@pytest.mark.parametrize("form", FORMS)
def test_dicts_and_lists_of_other_kinds_hold_weights(tmp_path, form):
    weights = defaultdict(dict)
    weights["block"] = OrderedDict(w=WEIGHT)
    if form != "legacy":  # torch itself refuses the counters of old files
        weights["counts"] = Counter("a")
    torch.save({"model": weights, "losses": deque([1.0, 2.0], maxlen=2)}, tmp_path / "x.pt", **FORMS[form])
    with checkpoints.open(tmp_path / "x.pt") as opened:
        assert list(opened.tensors) == ["block.w"] and torch.equal(opened.read("block.w"), WEIGHT)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i4", "<i8", "u8", "<f2", ">f4", "f8", "?"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_scalars_of_numpy_are_the_numbers_they_are(dtype, protocol):
    number = np.array(1, dtype=dtype).astype(dtype)[()]
    read = unpickle(pickle.dumps(number, protocol), stand_ins(()))
    assert read == number.item() and type(read) is type(number.item())


def test_scalars_of_the_wrong_size_are_damage():
    data = pickle.dumps(np.float64(1), 4)
    assert unpickle(data, stand_ins(())) == 1.0
    with pytest.raises(pickle.UnpicklingError, match="a NumPy scalar of 8 bytes"):
        unpickle(data.replace(b"f8", b"f4"), stand_ins(()))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_names_of_numpy_are_known(module):
    data = pickle.dumps(np.int64(5), 0).replace(
        np.int64.__reduce__(np.int64(5))[0].__module__.encode(), module.encode()
    )
    assert unpickle(data, stand_ins(())) == 5


@pytest.mark.parametrize("name", HARMLESS)
def test_no_pickle_changes_a_stand_in(name):
    stand_in = HARMLESS[name]
    before = dict(vars(stand_in))
    # BUILD sets attributes: those of slots come second, and are set one by one.
    for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"):
        code = b"\x80\x02c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n" + state + b"b."
        with pytest.raises((TypeError, pickle.UnpicklingError)):
            unpickle(code, stand_ins(()))
    assert dict(vars(stand_in)) == before


# Classes that nobody has where the file is read.


class Config:
    def __init__(self):
        self.step, self.rate = 99, 0.1

    def __setstate__(self, state):
        raise AssertionError("the class was used")


class WeightDict(dict):
    pass


class Both(list):
    pass


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


SYSTEM = f"{os.system.__module__}.system"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_harmless_is_refused_until_it_is_allowed(tmp_path, form):
    path, name = tmp_path / "x.pt", f"{__name__}.Config"
    torch.save({"model": {"w": WEIGHT}, "config": Config(), "epoch": 3}, path, **FORMS[form])
    with pytest.raises(CheckpointError, match=r"loading it would need \S+\.Config, and no code") as caught:
        checkpoints.open(path)
    assert str(caught.value).endswith(f'pass allow=["{name}"]')
    assert caught.value.for_command.endswith(f"give --allow {name}")
    with checkpoints.open(path, allow=[name]) as opened:
        assert opened.step == 3 and opened.ignored == ("config", "epoch")
        assert torch.equal(opened.read("w"), WEIGHT)
    with pytest.raises(CheckpointError):
        checkpoints.open(path)


def test_all_names_that_are_needed_are_named_at_once(tmp_path):
    torch.save({"w": WEIGHT, "a": Config(), "b": [Both([1]), {Config(): 1}]}, tmp_path / "x.pt")
    names = [f"{__name__}.Config", f"{__name__}.Both"]
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(tmp_path / "x.pt")
    assert caught.value.for_command.endswith(f"give --allow {names[0]} --allow {names[1]}")
    assert list(checkpoints.open(tmp_path / "x.pt", allow=names).tensors) == ["w"]


def test_weights_in_a_dict_of_a_class_that_is_allowed(tmp_path):
    torch.save({"state_dict": WeightDict(w=WEIGHT), "model": {"w": -WEIGHT}}, tmp_path / "x.pt")
    with checkpoints.open(tmp_path / "x.pt", allow=[f"{__name__}.WeightDict"]) as opened:
        assert opened.key == "state_dict" and torch.equal(opened.read("w"), WEIGHT)


def test_the_class_need_not_be_there(tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    exec("class Settings:\n    pass", vars(module))
    monkeypatch.setitem(sys.modules, "gone", module)
    torch.save({"w": WEIGHT, "settings": module.Settings()}, tmp_path / "x.pt")
    monkeypatch.delitem(sys.modules, "gone")
    assert list(checkpoints.open(tmp_path / "x.pt", allow=["gone.Settings"]).tensors) == ["w"]
    assert "gone" not in sys.modules


def test_nothing_is_run_even_where_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": WEIGHT}, "hook": Evil()}, "x.pt")
    with pytest.raises(CheckpointError, match=rf"loading it would need {SYSTEM}, and no code"):
        checkpoints.open("x.pt")
    with checkpoints.open("x.pt", allow=[SYSTEM]) as opened:
        assert torch.equal(opened.read("w"), WEIGHT)
    torch.save({"model": {"w": WEIGHT}, "hook": Evil()}, "old.pt", _use_new_zipfile_serialization=False)
    for allow in ((), [SYSTEM]):
        with pytest.raises(CheckpointError, match=SYSTEM):
            checkpoints.open("old.pt", allow=allow)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pt", "x.pt"]


class Net(nn.Linear):
    pass


def test_modules_pickled_whole_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"epoch": 3, "model": None, "ema": Net(2, 1).half()}, path)
    with pytest.raises(
        CheckpointError, match=r"A model was pickled whole: .* save its state_dict\(\)$"
    ) as caught:
        checkpoints.open(path)
    assert f"would need {__name__}.Net" in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoints.open(path, allow=[f"{__name__}.Net"])
    # As Lightning keeps the loss function among the hyper-parameters.
    torch.save({"state_dict": {"w": WEIGHT}, "hyper_parameters": {"loss": nn.MSELoss()}}, path)
    with pytest.raises(CheckpointError, match=r'pass allow=\["torch\.nn\.modules\.loss\.MSELoss"\]$'):
        checkpoints.open(path)
    assert list(checkpoints.open(path, allow=["torch.nn.modules.loss.MSELoss"]).tensors) == ["w"]


@pytest.mark.parametrize("allow", ["my.module.Config", ["Config"]])
def test_only_full_names_can_be_allowed(tmp_path, allow):
    with pytest.raises(OptionError, match="allow is a list of full names"):
        checkpoints.open(tmp_path / "x.pt", allow=allow)


def test_it_reaches_the_files_of_folders(tmp_path):
    names = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    for number, name in enumerate(names):
        torch.save({f"w{number}": WEIGHT, "args": Config()}, tmp_path / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin holds more than tensors"):
        checkpoints.open(tmp_path)
    opened = checkpoints.open(tmp_path, allow=[f"{__name__}.Config"])
    assert list(opened.tensors) == ["w0", "w1"]
    checkpoints.write(tmp_path / "x.safetensors", {"w": WEIGHT})
    assert list(checkpoints.open(tmp_path / "x.safetensors", allow=["my.Config"]).tensors) == ["w"]


def test_reading_old_files_leaves_torch_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"w": WEIGHT, "args": Namespace()}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    checkpoints.open(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "x.pt", weights_only=True)


class Entry(dict):
    pass


class Items(list):
    pass


def test_old_files_with_dicts_of_other_classes(tmp_path):
    from lightning.fabric.utilities.data import AttributeDict

    def opened(settings, *names):
        state = {"state_dict": {"w": WEIGHT}, "cfg": settings}
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        return checkpoints.open(tmp_path / "x.pt", allow=[f"{__name__}.{name}" for name in names])

    assert list(opened(AttributeDict(lr=0.1)).tensors) == ["w"]
    assert list(opened(Entry(lr=Entry(a=1)), "Entry").tensors) == ["w"]
    # torch's own reader of old files fills no list of another class: not to be read is not to be damaged.
    with pytest.raises(
        CheckpointError, match="objects that cannot be read as data there .* load it with torch.load"
    ):
        opened(Items([1]), "Items")


def test_settings_of_lightning_and_omegaconf(tmp_path):
    from lightning.fabric.utilities.data import AttributeDict

    torch.save({"state_dict": {"w": WEIGHT}, "hyper_parameters": AttributeDict(lr=0.1)}, tmp_path / "x.pt")
    assert checkpoints.open(tmp_path / "x.pt").ignored == ("hyper_parameters",)
    # As omegaconf writes them: made of nothing, then given a state.
    name = "omegaconf.dictconfig.DictConfig"
    code = b"\x80\x02c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n)\x81}X\x08\x00\x00\x00_content}sb."
    record = unpickle(code, stand_ins(()))
    assert type(record) is Record and record.state == {"_content": {}}


# DTensors


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_dtensors_that_are_whole_are_read(tmp_path, mesh):
    values = torch.arange(6.0).view(2, 3)
    for number, placement in enumerate((Shard(0), Shard(1), Replicate())):
        path = tmp_path / f"{number}.pt"
        torch.save({"w": distribute_tensor(values, mesh, [placement])}, path)
        with checkpoints.open(path) as opened:
            assert torch.equal(opened.read("w"), values)
            assert opened.location("w") is not None


def test_dtensors_that_are_not_whole_are_refused(tmp_path, mesh):
    shape, stride = torch.Size((4, 3)), (3, 1)
    shard = DTensor.from_local(
        torch.ones(2, 3), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    term = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()], run_check=False)
    for tensor, whole in ((shard, "4, 3"), (term, "2, 3")):
        torch.save({"model": {"w": tensor}}, tmp_path / "x.pt")
        with pytest.raises(
            CheckpointError, match=rf"a DTensor of shape \[{whole}\] .*full_state_dict=True"
        ) as caught:
            checkpoints.open(tmp_path / "x.pt")
        assert "damaged" not in str(caught.value)
        torch.save({"model": {"w": WEIGHT}, "aside": tensor}, tmp_path / "x.pt")
        assert list(checkpoints.open(tmp_path / "x.pt").tensors) == ["w"]


# Text, code, long lists and whatever else makes an argument of no fixed length, or must be seen.
LOOKED_AT = frozenset(pickle.PUT + pickle.GLOBAL + pickle.LONG1 + pickle.EXT1 + pickle.UNICODE + pickle.STOP)


@example(content=["a" * length for length in range(70)] + [[n] for n in range(300)], protocol=2, damage=None)
@given(
    content=CONTENTS,
    protocol=st.integers(0, 5),
    damage=st.none() | st.tuples(st.integers(0), st.integers(0, 255)),
)
def test_operations_are_those_that_pickletools_finds(content, protocol, damage):
    data = bytearray(pickle.dumps(content, protocol))
    if damage is not None:
        data[damage[0] % len(data)] = damage[1]
    data = bytes(data)
    try:
        expected = [ord(operation.code) for operation, _, _ in pickletools.genops(data)]
    except Exception:
        return  # pickletools also refuses arguments of which the unpickler is the judge
    found = [code for code, _ in _operations(data)]
    assert [code for code in found if code in LOOKED_AT] == [code for code in expected if code in LOOKED_AT]


@pytest.mark.parametrize("index", [b"p4000000000\n", b"r\xff\xff\xff\xf0"])
def test_a_memo_larger_than_the_file_is_refused(index):
    with pytest.raises(pickle.UnpicklingError, match="impossible memo index"):
        unpickle(b"\x80\x02}" + index + b".", stand_ins(()))
