"""Torch files: views of any stride, old files, and archives that are not what they seem."""

import shutil
import zipfile
from collections import Counter

import pytest
import torch

from polyak import checkpoints
from polyak.errors import CheckpointError


def rezip(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "good.pt"
    torch.save({"w": torch.arange(6.0).view(2, 3)}, path)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.bool]
)
def test_strided_views(tmp_path, dtype):
    base = torch.arange(120).view(2, 3, 4, 5).to(torch.float32).to(dtype)
    views = {
        "transposed": base[0, 0].t(),
        "permuted": base.permute(3, 1, 0, 2),
        "channels_last": base.clone(memory_format=torch.channels_last),
        "narrowed": base[:, 1:, 2:, ::2],
        "one_column": base[0, 0, :, 1:2],
        "expanded": base[0, 0, 0, :1].expand(4, 5),
        "offset": base.view(-1)[7:19],
        "overlapping": base.view(-1).as_strided((5, 4), (2, 1), 3),
    }
    torch.save(views, tmp_path / "x.pt")
    with checkpoints.open(tmp_path / "x.pt") as opened:
        for name, view in views.items():
            flat = view.contiguous().view(-1)
            assert torch.equal(opened.read(name).view(torch.uint8), view.contiguous().view(torch.uint8)), name
            assert torch.equal(
                opened.read_slice(name, 2, len(flat) - 1).view(torch.uint8),
                flat[2:-1].view(torch.uint8),
            ), name
            assert (opened.location(name) is None) == (not view.is_contiguous()), name
        assert opened.ties == {}


def test_ties_and_parameters(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    torch.save({"a": weight, "b": weight.detach(), "c": weight.view(6), "d": weight[1:]}, tmp_path / "x.pt")
    with checkpoints.open(tmp_path / "x.pt") as opened:
        assert opened.ties == {"b": "a"}
        assert torch.equal(opened.read("d"), weight.detach()[1:])


def test_ties_share_storage_when_written(tmp_path):
    weight = torch.randn(100)
    checkpoints.write(tmp_path / "x.pt", {"a": weight, "b": weight})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert set(loaded) == {"a", "b"}


def test_metadata_does_not_disturb_load_state_dict(tmp_path):
    model = torch.nn.BatchNorm1d(3)
    checkpoints.write(tmp_path / "x.pt", model.state_dict(), metadata={"step": "3"})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(loaded) == list(model.state_dict())
    torch.nn.BatchNorm1d(3).load_state_dict(loaded, strict=True)


def test_files_from_before_torch_1_6(tmp_path):
    state = {"a": torch.randn(3, 2), "t": torch.randn(3, 2).t(), "n": torch.tensor(3)}
    state["b"] = state["a"]
    torch.save({"model": state, "epoch": 2}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with checkpoints.open(tmp_path / "x.pth") as opened:
        assert not opened.is_lazy
        assert (opened.key, opened.step, opened.ties) == ("model", 2, {"b": "a"})
        assert opened.location("a") is None
        for name, tensor in state.items():
            assert torch.equal(opened.read(name), tensor)


def test_unusual_tensors_are_refused_only_among_the_weights(tmp_path):
    for unusual in (torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()):
        torch.save({"model": {"w": torch.ones(2)}, "aside": unusual}, tmp_path / "fine.pt")
        with checkpoints.open(tmp_path / "fine.pt") as opened:
            assert list(opened.tensors) == ["w"]
        torch.save({"w": unusual}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match="sparse, quantised or lazily conjugated"):
            checkpoints.open(tmp_path / "bad.pt")


def test_lazily_conjugated_tensors_are_written_as_they_look(tmp_path):
    tensor = torch.tensor([1 + 2j, 3 - 1j]).conj()
    checkpoints.write(tmp_path / "x.npz", {"w": tensor})
    with checkpoints.open(tmp_path / "x.npz") as opened:
        assert torch.equal(opened.read("w"), tensor)


def test_a_sparse_tensor_beside_the_weights_leaves_torch_as_it_was(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "mask": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with checkpoints.open(tmp_path / "x.pt") as opened:
        assert opened.read("w").tolist() == [1, 1] and opened.ignored == ("mask",)
    torch.save({"w": torch.ones(2)}, tmp_path / "y.pt")
    assert torch.load(tmp_path / "y.pt", weights_only=True)["w"].tolist() == [1, 1]


def test_tensors_with_attributes_and_what_else_torch_saves(tmp_path):
    weight, buffer = torch.nn.Parameter(torch.randn(3, 2)), torch.randn(3)
    weight.note, buffer.note = "attributes of its own", 1
    others = {
        "counter": Counter("abc"),
        "set": {1, 2},
        "bytes": b"abc",
        "complex": 1j,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "storage": torch.ones(2).untyped_storage(),
        "empty": torch.empty(0, 3),
    }
    torch.save({"model": {"weight": weight, "buffer": buffer}, **others, "step": 7}, tmp_path / "x.pt")
    with checkpoints.open(tmp_path / "x.pt") as opened:
        assert opened.step == 7 and set(opened.ignored) == {*others, "step"}
        assert torch.equal(opened.read("weight"), weight) and torch.equal(opened.read("buffer"), buffer)


class Settings:
    """A class that is the user's own."""


def test_what_the_user_calls_safe_is_left_out_and_not_made(tmp_path):
    torch.save({"w": torch.ones(2), "args": Settings()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"loading it would need \S+\.Settings"):
        checkpoints.open(tmp_path / "x.pt")
    with torch.serialization.safe_globals([Settings]), checkpoints.open(tmp_path / "x.pt") as opened:
        assert list(opened.tensors) == ["w"] and opened.ignored == ("args",)


def named(name):
    """The instructions that ask for something by its name."""
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


# Pickles that nobody's torch.save wrote: names of code, and attempts to change what later files are read with.
HARMFUL = {
    "a function": (named("os.getcwd") + b")R", r"would need os\.getcwd"),
    "a builtin of Python 2": (named("__builtin__.eval") + b")R", r"would need builtins\.eval"),
    "a part of torch": (named("torch.hub.load"), r"would need torch\.hub\.load"),
    "an extension": (b"\x82\x01", r"would need extension 1"),
    "a huge memo": (b"Nr\xff\xff\xff\x7f", "impossible memo index"),
    "a function's defaults": (
        named("torch._utils._rebuild_tensor_v2") + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b",
        "changes what is not its own",
    ),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_no_pickle_runs_or_changes_anything(tmp_path, archive, kind):
    code, message = HARMFUL[kind]
    rezip(
        archive, tmp_path / "bad.pt", lambda name, data: b"\x80\x02" + code + b"." if "pkl" in name else data
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(tmp_path / "bad.pt")
    assert checkpoints.open(archive).read("w").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: None if name.endswith("data/0") else data, "truncated, damaged"),
        (lambda name, data: data[:-1] if name.endswith("data/0") else data, "reaches beyond its data"),
        (lambda name, data: None if name.endswith("data.pkl") else data, "zip file with no weights"),
        (lambda name, data: b"" if name.endswith("data.pkl") else data, "truncated, damaged"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, archive, change, message):
    rezip(archive, tmp_path / "bad.pt", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(tmp_path / "bad.pt")


def test_a_member_that_is_not_at_its_place_is_refused_when_it_is_read(tmp_path, archive):
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as members:
        header = next(
            entry.header_offset for entry in members.infolist() if entry.filename.endswith("data/0")
        )
    for place, message in ((header, "is not at its place"), (header + 29, "lies outside it, or overlaps")):
        (tmp_path / "bad.pt").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        with checkpoints.open(tmp_path / "bad.pt") as opened, pytest.raises(CheckpointError, match=message):
            opened.read("w")


def test_compressed_archives_are_refused(tmp_path, archive):
    rezip(archive, tmp_path / "bad.pt", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"compressed after torch\.save: save it again"):
        checkpoints.open(tmp_path / "bad.pt")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="reaches beyond its data"):
        checkpoints.open(tmp_path / "x.pt")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/a.py", "x/version"):
            archive.writestr(name, b"3")
    with pytest.raises(CheckpointError, match="TorchScript archive, which is code"):
        checkpoints.open(tmp_path / "x.pt")


@pytest.mark.parametrize("saved", [torch.zeros(3), [torch.zeros(3)], 5])
def test_only_dicts_are_checkpoints(tmp_path, saved):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a dict: save the model's state_dict"):
        checkpoints.open(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "data", [b"hello world, this is text", b"\x1f\x8b\x08gzip......", b"GGUF\x03\0\0\0......."]
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="no checkpoint that is known .it begins with"):
        checkpoints.open(tmp_path / "x.pt")


def test_what_cannot_be_opened_is_named(tmp_path, archive):
    with pytest.raises(CheckpointError, match=r"cannot read .*absent\.pt: No such file"):
        checkpoints.open(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoints.open("/dev/null")


def test_a_file_replaced_meanwhile_is_noticed(tmp_path, archive):
    with checkpoints.open(archive) as opened:
        torch.save({"w": torch.zeros(2, 3)}, tmp_path / "other.pt")
        shutil.move(tmp_path / "other.pt", archive)
        opened.close()
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            opened.read("w")


def test_more_checkpoints_than_a_process_may_hold_open(tmp_path):
    for number in range(200):
        checkpoints.write(tmp_path / f"{number}.safetensors", {"w": torch.tensor([number])})
    opened = [checkpoints.open(tmp_path / f"{number}.safetensors") for number in range(200)]
    assert [checkpoint.read("w").item() for checkpoint in opened] == list(range(200))
