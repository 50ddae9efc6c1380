"""The directory of a zip file, checked before anything in it is believed (torch files and npz are zips)."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass

from polyak.checkpoints._io import DataFile
from polyak.errors import CheckpointError

__all__ = ["ZIP_MAGIC", "Member", "open_zip", "read_directory"]

ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
# DEFLATE cannot do better than 1032 to 1, so a member that promises more is a bomb.
_MAX_EXPANSION = 1032


@dataclass(frozen=True)
class Member:
    """One file inside a zip: its data lie at ``[offset, offset + packed_nbytes)`` of the file around it."""

    name: str
    offset: int
    packed_nbytes: int
    nbytes: int
    is_stored: bool

    @property
    def end(self) -> int:
        return self.offset + self.packed_nbytes


def open_zip(file: DataFile, start: int = 0, nbytes: int | None = None) -> zipfile.ZipFile:
    """A ``ZipFile`` over a part of a file."""
    try:
        return zipfile.ZipFile(file.window(start, nbytes))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile lets whatever the damaged bytes provoke escape
        raise CheckpointError(
            f"{file.path} is truncated or corrupt: its zip directory cannot be read ({error}); use another copy"
        ) from error


def read_directory(file: DataFile, start: int = 0, nbytes: int | None = None) -> dict[str, Member]:
    """All members by name.

    Raises ``CheckpointError`` for duplicate names, members that overlap or lie outside, encryption,
    compression other than DEFLATE, and sizes that no compression could reach.
    """
    stop = file.size if nbytes is None else start + nbytes
    members: dict[str, Member] = {}
    with open_zip(file, start, nbytes) as archive:
        for entry in archive.infolist():
            if entry.filename in members:
                raise CheckpointError(f"{file.path} is corrupt: it holds {entry.filename!r} twice")
            members[entry.filename] = _member(file, start, stop, entry)
    _refuse_overlaps(file, start, list(members.values()))
    return members


def _member(file: DataFile, start: int, stop: int, entry: zipfile.ZipInfo) -> Member:
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{file.path} is encrypted or compressed in a way that is not read: save it with plain DEFLATE or none"
        )
    header = start + entry.header_offset
    magic, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(file.read(header, _LOCAL_HEADER.size))
    offset = header + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    if magic != ZIP_MAGIC or offset + entry.compress_size > stop:
        raise CheckpointError(
            f"{file.path} is truncated or corrupt: member {entry.filename!r} lies outside it"
        )
    if is_stored and entry.compress_size != entry.file_size:
        raise CheckpointError(f"{file.path} is corrupt: member {entry.filename!r} has two different sizes")
    if entry.file_size > _MAX_EXPANSION * (entry.compress_size + 1):
        raise CheckpointError(
            f"{file.path} is a zip bomb: {entry.filename!r} claims {entry.file_size:,} bytes "
            f"from {entry.compress_size:,}; it is not read"
        )
    return Member(entry.filename, offset, entry.compress_size, entry.file_size, is_stored)


def _refuse_overlaps(file: DataFile, start: int, members: list[Member]) -> None:
    end = start
    for member in sorted(members, key=lambda member: (member.offset, member.end)):
        if member.offset < end:
            raise CheckpointError(f"{file.path} is corrupt: member {member.name!r} overlaps another")
        end = member.end
