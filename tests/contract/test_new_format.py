"""A new format is one class in one file: the contract suite finds it by itself, and it keeps the contract."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SUITE = [TESTS / "contract" / "test_formats.py", TESTS / "checkpoints" / "test_fuzz.py"]


def define():
    """A file of JSON, which says where each tensor lies, and the bytes of the tensors."""
    import json

    import torch

    from polyak.checkpoints import Format, TensorInfo
    from polyak.checkpoints._base import Contents, SpooledWriter, StridedRegion, byte_view
    from polyak.checkpoints._io import DataFile
    from polyak.errors import CheckpointError

    class RawFormat(Format):
        name = "raw"
        looks = "a raw file"
        suffixes = (".raw",)

        def recognises(self, path, start):
            return start[:4] == b"RAW1"

        def read(self, path):
            file = DataFile(path)
            begin = 12 + int.from_bytes(file.read(4, 8), "little")
            try:
                header = json.loads(file.read(12, begin - 12))
                tree = {}
                for name, (dtype, shape, offset) in header["tensors"].items():
                    info = TensorInfo(tuple(shape), getattr(torch, dtype))
                    tree[name] = StridedRegion(file, begin + offset, info)
                ties = {tied: tree[name] for tied, name in header["ties"].items()}
                return Contents(tree | ties, dict(header["metadata"]), files=(file,))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{path} has a damaged header ({error})") from error

        def writer(self, path, layout, overwrite):
            return RawWriter(path, layout, overwrite)

    class RawWriter(SpooledWriter):
        def _save(self, tensors, target):
            places, offset = {}, 0
            for name, info in self.layout.tensors.items():
                places[name] = (str(info.dtype).removeprefix("torch."), info.shape, offset)
                offset += info.nbytes
            metadata, ties = dict(self.layout.metadata), dict(self.layout.ties)
            header = json.dumps({"tensors": places, "ties": ties, "metadata": metadata}).encode()
            with target.open("xb") as stream:
                stream.write(b"RAW1" + len(header).to_bytes(8, "little") + header)
                for name in places:
                    stream.write(byte_view(tensors[name].view(-1)))


def pytest_configure():
    """Given to pytest as a plugin, this file defines the format before the suite is collected."""
    define()


@pytest.mark.slow
def test_a_new_format_goes_through_the_contract_suite():
    assert len(inspect.getsource(define).splitlines()) <= 60
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "test_new_format", "-p", "no:cacheprovider", "-k", "raw"]
    result = subprocess.run(
        [*command, *map(str, SUITE)],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") >= 25, result.stdout
