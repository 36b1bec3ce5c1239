"""The hashes of a kept base: one a tensor, each held against what is read when that is read first in a process. So no
start reads the whole of it, and no layer is computed with that has changed on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.reading import why_no_file
from qlora_tool.files.sealed import first_change, listing, read_sealed, write_sealed
from qlora_tool.files.tensors import SINGLE_NAME, Checkpoint

HASHES_NAME = "hashes.json"
_LONGEST_HEADER = 100_000_000  # bytes that the library takes


class DamagedBase(MachineError):
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
    files = listing(folder, others)
    write_sealed(folder / HASHES_NAME, {"header": _of_header(folder / SINGLE_NAME), "files": files,
                                        "tensors": dict(hashes)})  # fmt: skip


def _of_header(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
        length = min(int.from_bytes(start, "little"), _LONGEST_HEADER)
        return hashlib.sha256(start + stream.read(length)).hexdigest()


class KeptBase(Checkpoint):
    """A kept base, whose tensors are held against their hashes when they are read first.

    Raises:
        DamagedBase: there is no list of hashes, as in those of early versions, or it or the header has changed.
    """

    def __init__(self, folder: Path):
        try:
            if reason := why_no_file(folder / SINGLE_NAME):
                raise ValueError(reason)
            found = read_sealed(folder / HASHES_NAME)
            header, self._files, self._hashes = found["header"], dict(found["files"]), dict(found["tensors"])
            if _of_header(folder / SINGLE_NAME) != header:
                raise ValueError("the header of its file")
            super().__init__(folder)
        except UserError as error:  # its cure is of a model's files, which are downloaded
            raise DamagedBase(folder, f"{SINGLE_NAME} is cut off") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedBase(folder, str(error)) from error

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """See `Checkpoint.read`.

        Raises:
            DamagedBase: it is not as it was written.
        """
        if (expected := self._hashes.pop(name, None)) is None:
            return super().read(name, device)
        try:
            tensor = super().read(name)
        except (OSError, UserError) as error:
            raise DamagedBase(self.folder, f"{name} cannot be read") from error
        if _of_tensor(tensor) != expected:
            raise DamagedBase(self.folder, name)
        return tensor.to(device)

    def check_file(self, name: str) -> None:
        """Hold another file of the folder against its hash.

        Raises:
            DamagedBase: it is not as it was written.
        """
        if changed := first_change(self.folder, {name: self._files.get(name)}):
            raise DamagedBase(self.folder, changed)

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
