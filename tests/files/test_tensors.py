"""safetensors files, against the safetensors library both ways, and what broken ones are told."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from qlora_tool.errors import UserError
from qlora_tool.files.tensors import (
    Checkpoint,
    TensorSpec,
    missing_names,
    read_all,
    read_header,
    read_tensor,
    shard_name,
    shards,
    write_all,
    write_tensors,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOATS, *WHOLE, torch.bool, torch.complex64]


def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, odd shapes, a scalar, an empty one and names that JSON has to escape."""
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 4
    made = {f"of {dtype}": values.to(dtype) for dtype in FLOATS}
    made |= {f"of {dtype}": values.abs().to(torch.int64).to(dtype) for dtype in WHOLE}
    return made | {
        "bool": values > 0,
        "complex": torch.complex(values, -values),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        'a "name" \\ with ümlauts\n': values[:1].clone(),
    }


def write(file, named, metadata=None) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]
    write_tensors(file, specs, named.items(), metadata or {"format": "pt"})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (value.contiguous().reshape(-1).view(torch.uint8) for value in (found[name], tensor))
        assert torch.equal(ours, theirs), name  # byte by byte: some dtypes know no comparison


def fault(function, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments)
    (line,) = raised.value.lines
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------ the library's files


def test_every_dtype_of_the_library_is_covered():
    named = tensors()
    assert {tensor.dtype for tensor in named.values()} == set(DTYPES)
    library = set(safetensors.torch._TYPES.values()) - {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}  # one vendor's
    assert library <= set(DTYPES)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "ours.safetensors", tensors(), {"format": "pt", "b": "ü", "a": "1"})
    assert_same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), tensors())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b": "ü", "a": "1"}


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.torch.save_file(tensors(), tmp_path / "model.safetensors", {"format": "pt", "key": "ü"})
    assert_same(read_all(tmp_path / "model.safetensors"), tensors())
    checkpoint = Checkpoint(tmp_path)
    assert_same({name: checkpoint.read(name) for name in checkpoint}, tensors())
    assert list(read_all(tmp_path / "model.safetensors")) == sorted(tensors())


def test_a_streamed_file_is_the_librarys_byte_for_byte(tmp_path):
    """Written in the order that the library chose."""
    named = tensors()
    content = safetensors.torch.save(named, {"format": "pt"})
    (length,) = struct.unpack("<Q", content[:8])
    order = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    write(tmp_path / "ours", {name: named[name] for name in order})
    assert (tmp_path / "ours").read_bytes() == content


def test_the_same_input_gives_the_same_bytes(tmp_path):
    named = tensors()
    write(tmp_path / "one", named, {"b": "2", "a": "1"})
    write(tmp_path / "two", {name: tensor.clone() for name, tensor in named.items()}, {"a": "1", "b": "2"})
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert (8 + length) % 8 == 0
    assert list(json.loads(content[8 : 8 + length])) == ["__metadata__", *named]


# -------------------------------------------------------------------------------------------- files written in one go


def test_a_small_file_is_the_librarys(tmp_path):
    write_all(tmp_path / "ours", tensors(), {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors(), {"format": "pt"})
    backwards = dict(reversed([(name, tensor.clone()) for name, tensor in tensors().items()]))
    write_all(tmp_path / "again", backwards, {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()


def test_tensors_that_share_memory_are_written_each(tmp_path):
    """As tied parameters, slices and turned weights do; nothing of autograd is in the way."""
    value = torch.arange(24.0).view(4, 6)
    parameter = torch.nn.Parameter(value)
    named = {"one": parameter, "two": parameter, "turned": value.t(), "rows": value[1:3], "columns": value[:, ::2]}
    write_all(tmp_path / "file", named, {"format": "pt"})
    expected = {name: tensor.detach().contiguous().clone() for name, tensor in named.items()}
    assert_same(safetensors.torch.load_file(tmp_path / "file"), expected)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_small_file_may_be_read_by_whom_other_files_may(tmp_path):
    (tmp_path / "other").touch()
    write_all(tmp_path / "file", {"a": torch.ones(1)}, {"format": "pt"})
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_the_disk_refuses_is_an_error_of_the_system(tmp_path):
    """By which a full disk is told from other faults; the library puts the number into words."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        with pytest.raises(OSError) as raised:
            write_all(tmp_path / "file", {"a": torch.ones(1 << 16)}, {"format": "pt"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_tensor_of_a_small_file_is_in_aligned_memory_of_its_own(tmp_path):
    write_all(tmp_path / "file", {str(size): torch.ones(size) for size in range(1, 40)}, {"format": "pt"})
    before = (tmp_path / "file").read_bytes()
    assert {tensor.add_(1).data_ptr() % 64 for tensor in read_all(tmp_path / "file").values()} == {0}
    assert (tmp_path / "file").read_bytes() == before


def test_a_tensor_that_is_a_view_is_written_as_it_reads(tmp_path):
    value = torch.arange(24.0).view(4, 6)
    write(tmp_path / "file", {"turned": value.t(), "part": value[1:3, ::2]})
    assert_same(safetensors.torch.load_file(tmp_path / "file"), {"turned": value.t().contiguous(),
                                                                 "part": value[1:3, ::2].contiguous()})  # fmt: skip


def test_a_tensor_is_read_into_memory_of_its_own(tmp_path):
    write(tmp_path / "file", {"a": torch.zeros(4), "b": torch.ones(4)})
    entries = read_header(tmp_path / "file")
    first = read_tensor(entries["a"])
    first.add_(7)  # would fail, or write to the disk, on mapped memory
    assert read_tensor(entries["a"]).tolist() == [0.0] * 4
    assert read_tensor(entries["b"], torch.device("meta")).is_meta


# ---------------------------------------------------------------------------------------------- the stream of tensors


def test_a_stream_is_written_as_it_comes(tmp_path):
    """Each tensor is on its way to the disk before the next one is made."""
    specs = [TensorSpec(str(index), torch.float32, (1 << 16,)) for index in range(4)]
    sizes = []

    def stream():
        for spec in specs:
            sizes.append((tmp_path / "file").stat().st_size)
            yield spec.name, torch.full(spec.shape, float(spec.name))

    write_tensors(tmp_path / "file", specs, stream(), {})
    # All but what may still lie in the file's own buffer.
    assert all(size >= index * (1 << 18) - (1 << 17) for index, size in enumerate(sizes))
    assert read_all(tmp_path / "file")["3"][0] == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("b", torch.ones(2)), ("a", torch.ones(2))], "got b"),
        ([("a", torch.ones(2).half()), ("b", torch.ones(2))], "torch.float16"),
        ([("a", torch.ones(2, 1)), ("b", torch.ones(2))], r"\(2, 1\)"),
        ([("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))], "announced None, got c"),
        ([("a", torch.ones(2))], "ended early"),
        ([], "ended early"),
    ],
)
def test_a_stream_that_breaks_its_announcement_is_refused(tmp_path, given, words):
    specs = [TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match=words):
        write_tensors(tmp_path / "file", specs, iter(given), {})


def test_shards_keep_the_order_and_the_limit():
    specs = [TensorSpec(str(size), torch.uint8, (size,)) for size in (4, 3, 3, 25, 1, 9, 10, 0)]
    cut = shards(specs, 10)
    assert [[spec.nbytes for spec in shard] for shard in cut] == [[4, 3, 3], [25], [1, 9], [10, 0]]
    assert [spec for shard in cut for spec in shard] == specs
    assert shards([], 10) == []
    assert [shard_name(index, 3) for index in (0, 2)] == [
        "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors",
    ]  # fmt: skip
    assert shard_name(0, 1) == "model.safetensors"


# -------------------------------------------------------------------------------------------------------- checkpoints


def sharded(folder):
    """Two shards with an index, as transformers writes them."""
    parts = {shard_name(0, 2): {"a": torch.ones(3), "b": torch.ones(2)}, shard_name(1, 2): {"c": torch.arange(4.0)}}
    for name, named in parts.items():
        safetensors.torch.save_file(named, folder / name)
    weight_map = {name: file for file, named in parts.items() for name in named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_checkpoint_is_its_shards(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path))
    assert sorted(checkpoint) == ["a", "b", "c"]
    assert len(checkpoint) == 3
    assert checkpoint.nbytes == (3 + 2 + 4) * 4
    assert (checkpoint["c"].shape, checkpoint["c"].dtype) == ((4,), torch.float32)
    assert checkpoint.read("c").tolist() == [0, 1, 2, 3]
    assert "d" not in checkpoint


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / shard_name(1, 2)).unlink()
    line = fault(Checkpoint, tmp_path)
    assert f"{tmp_path}: 1 of 2 shards is missing ({shard_name(1, 2)})" in line
    assert "download" in line


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "x"}}', "3"]
)
def test_a_broken_index_is_named(tmp_path, content):
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    assert str(tmp_path / "model.safetensors.index.json") in fault(Checkpoint, tmp_path)


def test_pickles_are_not_read_and_the_way_out_works(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    line = fault(Checkpoint, tmp_path)
    assert "pytorch_model.bin" in line
    _, _, code = line.partition('python -c "')
    assert code.endswith('"')
    compile(code[:-1], "the command", "exec")
    assert f"from_pretrained('{tmp_path}').save_pretrained(" in code


def test_a_folder_without_weights_is_told_what_was_expected(tmp_path):
    line = fault(Checkpoint, tmp_path)
    assert line.startswith(f"{tmp_path}: no weights in it")
    assert "model.safetensors" in line


# ------------------------------------------------------------------------------------------------------- broken files


def header(file, entries, data=b"") -> None:
    encoded = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    write(file, {"a": torch.ones(100), "b": torch.ones(100)})
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    for line in (fault(Checkpoint, tmp_path), fault(read_all, file)):
        assert line.startswith(f"{file}: truncated")
        assert line.endswith(f"{len(content[:keep])} bytes); download it again")


def test_a_pointer_of_git_lfs_is_no_safetensors_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    line = fault(Checkpoint, tmp_path)
    assert line.startswith(f"{file}: a pointer of Git LFS, not the file itself") and "git lfs pull" in line


@pytest.mark.parametrize("stale", [True, False])
def test_one_file_is_read_before_an_index_as_transformers_does(tmp_path, stale, caplog):
    """Whoever saves a model into the folder of its shards leaves the index, and perhaps the shards, of the old one."""
    sharded(tmp_path)
    if stale:
        for shard in tmp_path.glob("model-*.safetensors"):
            shard.unlink()
    safetensors.torch.save_file({"only": torch.arange(3)}, tmp_path / "model.safetensors")
    for _ in range(2):
        assert list(Checkpoint(tmp_path)) == ["only"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}: model.safetensors is read") and "model.safetensors.index.json" in line


@pytest.mark.parametrize("content", [b"not json", b"[1, 2]", b"3", b"\xff\xfe{}", b"null"])
def test_a_header_that_is_no_object_is_named(tmp_path, content):
    header(tmp_path / "file", content)
    assert fault(read_header, tmp_path / "file").startswith(f"{tmp_path / 'file'}: truncated, or not a safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        "text",
        None,
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_a_header_with_a_broken_entry_is_refused(tmp_path, entry):
    header(tmp_path / "file", {"__metadata__": {}, "the.tensor": entry}, b"\0" * 8)
    for read in (read_header, read_all):
        assert fault(read, tmp_path / "file").startswith(f"{tmp_path / 'file'}: truncated, or not a safetensors file (")


@pytest.mark.parametrize(("start", "size"), [(4, 8), (0, 9)])
def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path, start, size):
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [start, start + 4]}
    header(tmp_path / "file", {"a": entry}, b"\0" * size)
    assert "truncated, or not a safetensors file" in fault(read_header, tmp_path / "file")


def test_an_unknown_dtype_is_named(tmp_path):
    header(tmp_path / "file", {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\0\0")
    for read in (read_header, read_all):
        assert "tensor a has dtype F4" in fault(read, tmp_path / "file")
    header(tmp_path / "file", {"a": {"dtype": "Q9", "shape": [4], "data_offsets": [0, 2]}}, b"\0\0")
    assert "`Q9`" in fault(read_header, tmp_path / "file")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = tmp_path / "file"
    write(file, {"a": torch.ones(100)})
    entry = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-40])
    assert f"{file}: ended 40 bytes early" in fault(read_tensor, entry)


def test_many_names_become_a_few_with_the_closest_that_is_there():
    assert missing_names(["b", "a"], {}) == "a, b"
    assert missing_names(["d", "c", "b", "a"], {}) == "a, b and 2 more"
    assert missing_names(["model.norm.weight"], {"model.norms.weight": None}) == (
        "model.norm.weight; did you mean 'model.norms.weight'?"
    )
