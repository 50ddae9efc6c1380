"""One contract for every format there is: what is written in one and converted to another comes back bit for bit."""

import itertools

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.checkpoints import Layout, TensorInfo
from polyak.checkpoints._base import FORMATS
from polyak.errors import CheckpointError, OptionError, OutputExistsError, StructureError

PAIRS = list(itertools.product(FORMATS, FORMATS))
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)
SHAPES = ((), (1,), (7,), (3, 5), (2, 1, 3), (0,), (4, 0))


def example_tensors():
    """Every dtype in every shape, filled with random bits; two names of one tensor; a name with odd letters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        top = 2 if dtype == torch.bool else 256
        numel = torch.Size(shape).numel()
        bits = torch.randint(top, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[f"{dtype}.{'x'.join(map(str, shape))}"] = bits.view(dtype).view(shape)
    tensors["tied"] = tensors["torch.bfloat16.3x5"]
    tensors["ключ/with spaces 'n' \"quotes\""] = torch.arange(3.0)
    return tensors


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name] == TensorInfo(tuple(tensor.shape), tensor.dtype)
        read = checkpoint.read(name)
        assert read.shape == tensor.shape and read.dtype == tensor.dtype
        assert torch.equal(as_bytes(read), as_bytes(tensor)), name


def suffix(format):
    return next(iter(FORMATS[format].suffixes), "")


def output(folder, format):
    return folder / f"out{suffix(format)}"


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversion_keeps_bits_ties_and_metadata(tmp_path, source, target):
    tensors = example_tensors()
    first, second = tmp_path / f"first{suffix(source)}", tmp_path / f"second{suffix(target)}"
    checkpoints.write(first, tensors, format=source, metadata={"step": "12", "note": "naïve"})

    with checkpoints.open(first) as opened:
        layout = Layout(
            {name: info for name, info in opened.tensors.items() if name not in opened.ties},
            opened.ties,
            {key: text for key, text in opened.metadata.items() if key != "format"},
        )
        with checkpoints.create(second, layout, format=target) as writer:
            for name in layout.tensors:
                writer.write(name, 0, opened.read(name).view(-1))

    with checkpoints.open(second) as converted:
        assert converted.format == target
        assert_same(converted, tensors)
        assert {frozenset(pair) for pair in converted.ties.items()} == {
            frozenset({"tied", "torch.bfloat16.3x5"})
        }
        assert converted.metadata.items() >= {"step": "12", "note": "naïve"}.items()
        assert converted.step == 12
        assert converted.key is None and converted.note == "" and converted.is_lazy
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([first.name, second.name])


def test_averages_come_from_it_and_go_into_it(tmp_path, format):
    for step, value in ((1, 1.0), (2, 4.0)):
        tensors = {"w": torch.full((3, 2), value), "n": torch.tensor(step)}
        checkpoints.write(tmp_path / f"step-{step}{suffix(format)}", tensors, format=format)
    inputs = [tmp_path / f"step-{step}{suffix(format)}" for step in (1, 2)]
    path = output(tmp_path, format)
    with pytest.warns(UserWarning, match="copied from the last input, though the inputs differ in 'n'"):
        polyak.average_checkpoints(inputs, path)
    with checkpoints.open(path) as average:
        assert average.format == format or not FORMATS[format].suffixes
        assert_same(average, {"w": torch.full((3, 2), 2.5), "n": torch.tensor(2)})


def test_slices_are_those_of_the_flat_tensor(tmp_path, format):
    tensors = {str(dtype): example_tensors()[f"{dtype}.3x5"] for dtype in DTYPES}
    checkpoints.write(output(tmp_path, format), tensors, format=format)
    with checkpoints.open(output(tmp_path, format)) as opened:
        for name, tensor in tensors.items():
            for start, stop in ((0, 0), (0, 1), (3, 11), (14, 15), (15, 15), (0, 15), (2, 4)):
                part = opened.read_slice(name, start, stop)
                assert part.dtype == tensor.dtype and part.shape == (stop - start,)
                assert torch.equal(
                    as_bytes(part), as_bytes(tensor)[start * tensor.itemsize : stop * tensor.itemsize]
                )


def test_locations_are_where_the_bytes_lie(tmp_path, format):
    tensors = {name: tensor for name, tensor in example_tensors().items() if tensor.numel()}
    checkpoints.write(output(tmp_path, format), tensors, format=format)
    with checkpoints.open(output(tmp_path, format)) as opened:
        for name, tensor in tensors.items():
            location = opened.location(name)
            assert location is not None
            data = location.path.read_bytes()[location.offset :][: opened.tensors[name].nbytes]
            assert data == as_bytes(tensor).numpy().tobytes()


def test_slices_may_be_written_in_any_order(tmp_path, format):
    weight = torch.randn(10).bfloat16()
    layout = Layout({"w": TensorInfo((2, 5), torch.bfloat16), "n": TensorInfo((), torch.int64)}, {"v": "w"})
    with checkpoints.create(output(tmp_path, format), layout, format=format) as writer:
        for start in (6, 0, 3, 9):
            writer.write("w", start, weight[start : start + 3])
        writer.write("n", 0, torch.tensor([5]))
    with checkpoints.open(output(tmp_path, format)) as opened:
        assert_same(opened, {"w": weight.view(2, 5), "v": weight.view(2, 5), "n": torch.tensor(5)})


def test_a_failure_leaves_nothing(tmp_path, format):
    layout = Layout({"w": TensorInfo((4,), torch.float32)})
    with (
        pytest.raises(KeyboardInterrupt),
        checkpoints.create(output(tmp_path, format), layout, format=format),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tmp_path, format):
    path = output(tmp_path, format)
    checkpoints.write(path, {"w": torch.zeros(3)}, format=format)
    with pytest.raises(OutputExistsError, match="exists already"):
        checkpoints.write(path, {"w": torch.ones(3)}, format=format)
    with checkpoints.open(path) as opened:
        assert_same(opened, {"w": torch.zeros(3)})

    checkpoints.write(path, {"w": torch.ones(3)}, format=format, overwrite=True)
    with checkpoints.open(path) as opened:
        assert_same(opened, {"w": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_it_wrote_holds_no_other_files(tmp_path, format):
    checkpoints.write(output(tmp_path, format), example_tensors(), format=format)
    items = list(output(tmp_path, format).glob("*"))
    assert all(any(item.match(pattern) for pattern in FORMATS[format].own_files) for item in items)


def test_the_same_input_gives_the_same_bytes(tmp_path, format):
    if format == "dcp":
        pytest.skip("torch.distributed.checkpoint puts a fresh id into its metadata")
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        checkpoints.write(output(folder, format), example_tensors(), format=format)
        files.append([item.read_bytes() for item in sorted(folder.rglob("*")) if item.is_file()])
    assert files[0] == files[1]


def test_wrong_slices_are_refused(tmp_path, format):
    layout = Layout({"w": TensorInfo((4,), torch.float32)})
    for name, start, values in (
        ("v", 0, torch.zeros(4)),
        ("w", 0, torch.zeros(4, dtype=torch.float64)),
        ("w", 2, torch.zeros(3)),
        ("w", -1, torch.zeros(2)),
        ("w", 0, torch.zeros(2, 2)),
        ("w", 0, torch.zeros(8)[::2]),
    ):
        with (
            pytest.raises(StructureError, match="no part of"),
            checkpoints.create(output(tmp_path, format), layout, format=format) as writer,
        ):
            writer.write(name, start, values)
    assert list(tmp_path.iterdir()) == []


def test_wrong_reads_are_refused(tmp_path, format):
    checkpoints.write(output(tmp_path, format), {"w": torch.arange(4.0)}, format=format)
    with checkpoints.open(output(tmp_path, format)) as opened:
        for start, stop in ((-1, 2), (3, 2), (0, 5)):
            with pytest.raises(OptionError, match="not inside the 4 elements"):
                opened.read_slice("w", start, stop)
        with pytest.raises(StructureError, match="no tensor 'v'; it has 'w'"):
            opened.read("v")
        with pytest.raises(OptionError, match="cannot take elements"):
            opened.read_into("w", 0, torch.zeros(2, dtype=torch.float64))


def test_a_key_where_there_is_none_is_refused(tmp_path, format):
    checkpoints.write(output(tmp_path, format), {"w": torch.arange(4.0)}, format=format)
    with pytest.raises(OptionError, match="no weights under 'ema': leave the key out"):
        checkpoints.open(output(tmp_path, format), key="ema")


def test_every_truncation_is_noticed(tmp_path, format):
    """Cut one file of the checkpoint at a spread of places, its boundaries among them."""
    tensors = {"a": torch.randn(40, 3), "b": torch.arange(5)}
    path = output(tmp_path, format)
    checkpoints.write(path, tensors, format=format)
    victim = max([path, *path.rglob("*")], key=lambda item: item.stat().st_size if item.is_file() else -1)
    data = victim.read_bytes()
    for size in sorted({*range(0, 130, 13), *range(0, len(data), 97), len(data) - 1}):
        victim.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=str(path)), checkpoints.open(path) as opened:
            for name in opened.tensors:
                opened.read(name)


def test_formats_are_told_by_contents_not_by_name(tmp_path):
    for format in FORMATS:
        if suffix(format) == "":
            continue
        path = tmp_path / f"{format}.weights"
        checkpoints.write(path, {"w": torch.ones(2)}, format=format)
        with checkpoints.open(path) as opened:
            assert opened.format == format


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(OptionError, match="unknown format 'gguf': choose from 'dcp', .*'safetensors'"):
        checkpoints.write(tmp_path / "x", {"w": torch.ones(2)}, format="gguf")
    with pytest.raises(OptionError, match="suffix of no known format"):
        checkpoints.write(tmp_path / "x.gguf", {"w": torch.ones(2)})
