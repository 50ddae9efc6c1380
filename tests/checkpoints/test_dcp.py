"""torch.distributed.checkpoint folders: torch on both sides, chunks from several ranks, unsafe metadata."""

import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from polyak import checkpoints
from polyak.errors import CheckpointError
from ranks import run_on_ranks


@pytest.fixture
def folder(tmp_path):
    model = torch.nn.Linear(3, 4)
    saved = {
        "model": {"layer.weight": model.weight, "layer.bias": model.bias, "half": torch.randn(5).bfloat16()},
        "optim": {"state": {0: {"exp_avg": torch.zeros(3)}}, "groups": [{"lr": 0.1}]},
        "step": 11,
        "name": "run",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp", saved["model"]


def change_metadata(path, change):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_it_reads_torch(folder):
    path, model = folder
    with checkpoints.open(path) as opened:
        assert (opened.format, opened.key, opened.step) == ("dcp", "model", 11)
        assert opened.ignored == ("optim", "step", "name")
        assert set(opened.tensors) == set(model)
        for name, tensor in model.items():
            assert torch.equal(opened.read(name), tensor)
    with checkpoints.open(path, key="optim.state") as opened:
        assert list(opened.tensors) == ["0.exp_avg"]


def test_torch_reads_it(tmp_path):
    tensors = {"a.w": torch.randn(3, 5), "n": torch.tensor(3)}
    checkpoints.write(tmp_path / "out", tensors | {"tied": tensors["a.w"]}, format="dcp")
    target = {"a.w": torch.zeros(3, 5), "n": torch.tensor(0), "tied": torch.zeros(3, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(target["tied"], tensors["a.w"])


def save_sharded(path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(1050).view(7, 10, 15).bfloat16()
    places = {"rows": Shard(0), "columns": Shard(1), "last": Shard(2), "copies": Replicate()}
    tensors = {name: distribute_tensor(whole, mesh, [place]) for name, place in places.items()}
    dcp.save({"model": tensors}, checkpoint_id=path)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "dcp"
    run_on_ranks(save_sharded, path)
    return path


@pytest.mark.parametrize("block_elements", [1 << 16, 7])
def test_chunks_of_two_ranks(sharded, monkeypatch, block_elements):
    monkeypatch.setattr("polyak.checkpoints._dcp._BLOCK_ELEMENTS", block_elements)
    whole = torch.arange(1050).bfloat16()
    with checkpoints.open(sharded) as opened:
        assert len(list(sharded.glob("*.distcp"))) == 2
        assert set(opened.tensors) == {"rows", "columns", "last", "copies"}
        for name in opened.tensors:
            assert torch.equal(opened.read(name), whole.view(7, 10, 15)), name
            assert (opened.location(name) is None) == (name != "copies")
            for start, stop in ((0, 1), (3, 160), (149, 151), (1049, 1050), (500, 500)):
                assert torch.equal(opened.read_slice(name, start, stop), whole[start:stop])


def test_missing_files_are_all_named(folder):
    path, _ = folder
    for file in path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks '__0_0\.distcp': copy the files of all ranks"):
        checkpoints.open(path)


def test_missing_chunks(folder):
    path, _ = folder
    index = MetadataIndex("model.layer.bias", [0])
    change_metadata(path, lambda metadata: metadata.storage_data.pop(index))
    with pytest.raises(CheckpointError, match=r"lacks a chunk of tensor 'model\.layer\.bias'"):
        checkpoints.open(path)


def test_chunks_that_do_not_tile(folder):
    path, _ = folder
    change_metadata(path, lambda metadata: metadata.state_dict_metadata["model.half"].chunks.clear())
    with pytest.raises(CheckpointError, match=r"chunks of tensor 'model\.half' do not tile its shape \[5\]"):
        checkpoints.open(path)


def test_chunks_that_overlap_and_leave_a_hole(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "dcp")

    def shift(metadata):
        chunks = metadata.state_dict_metadata["model.columns"].chunks
        (second,) = (chunk for chunk in chunks if chunk.offsets[1])
        place = metadata.storage_data.pop(MetadataIndex("model.columns", second.offsets))
        second.offsets = torch.Size([0, 2, 0])
        metadata.storage_data[MetadataIndex("model.columns", second.offsets)] = place

    change_metadata(tmp_path / "dcp", shift)
    with checkpoints.open(tmp_path / "dcp") as opened, pytest.raises(CheckpointError, match="do not tile"):
        opened.read("columns")


def test_chunks_that_are_not_what_they_should_be(folder):
    path, _ = folder

    def swap(metadata):
        weight, bias = MetadataIndex("model.layer.weight", [0, 0]), MetadataIndex("model.layer.bias", [0])
        storage = metadata.storage_data
        storage[weight], storage[bias] = storage[bias], storage[weight]

    change_metadata(path, swap)
    with pytest.raises(CheckpointError, match="not what the metadata says"), checkpoints.open(path) as opened:
        opened.read("layer.weight")


def test_files_elsewhere_are_refused(folder):
    path, _ = folder

    def point_elsewhere(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../other.distcp"

    change_metadata(path, point_elsewhere)
    with pytest.raises(CheckpointError, match=r"refers to files outside it: '\.\./other\.distcp'"):
        checkpoints.open(path)


def test_compressed_chunks_are_refused(folder):
    path, _ = folder

    def pretend(metadata):
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["zstd"]

    change_metadata(path, pretend)
    with pytest.raises(CheckpointError, match="compressed by a DCP extension: save it again without"):
        checkpoints.open(path)


def test_code_in_metadata_is_never_run(folder):
    path, _ = folder

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(path / "harm was done"),)

    change_metadata(path, lambda metadata: setattr(metadata, "planner_data", Harmful()))
    with pytest.raises(CheckpointError, match=r"needs posix\.mkdir, and no code from a checkpoint is run"):
        checkpoints.open(path)
    assert not (path / "harm was done").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda half: setattr(half.properties, "dtype", torch.strided),
        lambda half: setattr(half, "size", (0, 1 << 80)),
    ],
)
def test_metadata_that_describe_no_tensor_are_refused(folder, change):
    path, _ = folder

    def empty(metadata):
        half = metadata.state_dict_metadata["model.half"]
        half.chunks.clear()
        half.size = (0,)
        change(half)

    change_metadata(path, empty)
    with pytest.raises(CheckpointError, match=r"no tensor as 'model\.half'"):
        checkpoints.open(path)
