"""The hashes of a kept base: one a tensor, each held against what is read when that is read first in a process. So no
start reads the whole of it, and no layer is computed with that has changed on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_tool.errors import UserError
from qlora_tool.files.digest import sha256
from qlora_tool.files.sealed import read_sealed, write_sealed
from qlora_tool.files.tensors import SINGLE_NAME, Checkpoint

HASHES_NAME = "hashes.json"


class DamagedBase(UserError):
    """A kept base is not as it was written. It has been removed: it can be made again."""

    def __init__(self, folder: Path, what: str):
        shutil.rmtree(folder, ignore_errors=True)
        super().__init__(f"{folder}: the base that is kept there is not as it was written ({what}): most likely a "
                         "fault of the disk; it was removed, and the same command makes it anew")  # fmt: skip


def hashed(tensors: Iterable[tuple[str, Tensor]], hashes: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they come, their hashes noted by name."""
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous().cpu()
        hashes[name] = _of_tensor(tensor)
        yield name, tensor


def _of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def write_hashes(folder: Path, hashes: Mapping[str, str], others: Iterable[str] = ()) -> None:
    """Write what a kept base's tensors, its header and its other files are to be.

    Args:
        folder: where it lies, under a temporary name.
        hashes: of the tensors.
        others: names of files that are read whole.

    Raises:
        MachineError: the disk refuses.
    """
    files = {name: sha256(folder / name) for name in others if (folder / name).exists()}
    write_sealed(folder / HASHES_NAME, {"header": _of_header(folder / SINGLE_NAME), "files": files,
                                        "tensors": dict(hashes)})  # fmt: skip


def _of_header(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
        return hashlib.sha256(start + stream.read(int.from_bytes(start, "little"))).hexdigest()


class KeptBase(Checkpoint):
    """A kept base, whose tensors are held against their hashes when they are read first. One of an earlier version has
    none, and is read as it is.

    Raises:
        UserError: see `Checkpoint`; or its header or its list of hashes has changed.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._hashes: dict[str, str] = {}
        self._files: dict[str, str] = {}
        if not (folder / HASHES_NAME).exists():
            return
        try:
            found = read_sealed(folder / HASHES_NAME)
            header, self._files, self._hashes = found["header"], dict(found["files"]), dict(found["tensors"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / HASHES_NAME}: {error}") from error
        if _of_header(folder / SINGLE_NAME) != header:
            raise UserError(f"{folder / SINGLE_NAME}: its header is not as it was written")

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """See `Checkpoint.read`.

        Raises:
            DamagedBase: it is not as it was written.
        """
        if (expected := self._hashes.pop(name, None)) is None:
            return super().read(name, device)
        tensor = super().read(name)
        if _of_tensor(tensor) != expected:
            raise DamagedBase(self.folder, name)
        return tensor.to(device)

    def check_file(self, name: str) -> None:
        """Hold another file of the folder against its hash.

        Raises:
            DamagedBase: it is not as it was written.
        """
        if name in self._files and sha256(self.folder / name) != self._files[name]:
            raise DamagedBase(self.folder, name)

    def check_of(self, names: Sequence[str], start: int) -> Callable[[memoryview], None] | None:
        """What holds bytes of the file against the hashes of tensors; None where there are none.

        Args:
            names: of the tensors in them.
            start: the first byte in the file.

        Returns:
            Takes the bytes, and raises `DamagedBase` where they are not as they were written.
        """
        expected = [(name, self._hashes[name], self[name]) for name in names if name in self._hashes]
        if not expected:
            return None

        def check(part: memoryview) -> None:
            for name, digest, entry in expected:
                if hashlib.sha256(part[entry.start - start : entry.stop - start]).hexdigest() != digest:
                    raise DamagedBase(self.folder, name)

        return check
