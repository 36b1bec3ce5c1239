"""Blocks of GGUF files: their bytes as `gguf` decodes them, and how near their values lie."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tiny_adapters import artifact_of, write_adapter, write_chat_base
from tiny_ggufs import gguf_of, merged_of

from qlora_tool.export.gguf.mixture import MIXTURES
from qlora_tool.export.gguf.read_back import read_back
from qlora_tool.export.gguf.write import block_bytes
from qlora_tool.export.grids.block_types import BLOCK_TYPES
from qlora_tool.export.grids.fit import fit, nearest
from qlora_tool.export.grids.threads import on_every_core
from qlora_tool.files.tensors import Checkpoint, read_tensor

KINDS = BLOCK_TYPES.values()
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "IQ4_NL": 4.5, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


def weights(kind, blocks: int = 64) -> torch.Tensor:
    """Rows of many sizes, some far from 0, some with an outlier; all zero, all alike, and what float16 cannot hold."""
    generator = torch.Generator().manual_seed(len(kind.name))
    values = torch.randn(blocks, kind.weights, generator=generator)
    values *= torch.logspace(-4, 1, blocks).unsqueeze(1)
    values[3] += 5 * values[3].std()
    values[4, 7] *= 30
    values[5], values[6], values[7] = 0, 0.25, -0.25
    values[8] = 1e-12 * values[8]
    return values


def decoded(kind, blocks) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(kind.pack(blocks).numpy(), gguf.GGMLQuantizationType[kind.name]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bytes_are_decoded_to_the_values_that_were_chosen(kind):
    blocks = fit(kind, weights(kind))
    packed = kind.pack(blocks)
    assert packed.dtype == torch.uint8 and packed.shape[1] * 8 == BITS[kind.name] * kind.weights
    assert torch.equal(decoded(kind, blocks), kind.values(blocks))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_weight_is_on_the_nearest_value_of_its_block(kind):
    """By trying all levels of each sub-block with the a and b that it has."""
    x = weights(kind)
    blocks = fit(kind, x)
    a, b = (part.unsqueeze(-1) for part in kind.coefficients(blocks))
    parts = x.view(len(x), kind.sub_blocks, -1)
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    least = (a.unsqueeze(-1) * levels + b.unsqueeze(-1) - parts.unsqueeze(-1)).abs().amin(-1)
    found = (kind.values(blocks) - x).abs().view_as(parts)
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-6 * float(x.abs().max()))  # of two as near either one


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")],
                         ids=lambda kind: kind.name)  # fmt: skip
def test_no_block_is_worse_than_ggufs_own(kind):
    """`gguf` takes the scale in which the largest weight fits."""
    x = weights(kind, 256)
    own = gguf.GGMLQuantizationType[kind.name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), own), own).copy())
    ours = kind.values(fit(kind, x))
    error, other = (((found - x).double() ** 2).sum(1) for found in (ours, theirs))
    assert float((error / other.clamp(min=1e-30)).median()) < 0.97
    assert (error <= other * 1.001 + 1e-24).all()


def samples() -> dict[str, torch.Tensor]:
    """Normal weights, weights with long tails, sixteen even values for every 32, and weights that are all positive."""
    random = np.random.RandomState(14)
    values = {"normal": random.standard_normal((48, 512)) * 0.02, "long tails": random.standard_t(4, (48, 512)) * 0.02}
    lows = random.uniform(-0.1, -0.02, (48, 16, 1))
    steps = random.uniform(0.002, 0.01, (48, 16, 1))
    values["on a grid"] = (steps * random.randint(0, 16, (48, 16, 32)) + lows).reshape(48, 512)
    values["positive"] = np.abs(random.standard_normal((48, 512))) * 0.02 + 0.01
    return {name: torch.from_numpy(one.astype(np.float16)).float() for name, one in values.items()}


# The mean squared error of what ggml_quantize_chunk of llama.cpp (0c1e57098) makes of the four samples, without an
# importance matrix; test_llama_cpp.py asks the library itself.
LLAMA_CPPS = {
    "Q4_0": (2.9748e-06, 1.0457e-05, 6.5278e-06, 4.2330e-06),
    "Q4_1": (2.4805e-06, 6.8014e-06, 6.2636e-07, 7.6653e-07),
    "Q5_0": (7.3832e-07, 2.6266e-06, 1.5976e-06, 1.0434e-06),
    "Q5_1": (5.8133e-07, 1.5613e-06, 6.8884e-07, 1.7770e-07),
    "IQ4_NL": (2.3291e-06, 6.6954e-06, 6.7612e-06, 3.7347e-06),
    "Q4_K": (2.0507e-06, 5.7331e-06, 3.2757e-07, 9.9475e-07),
    "Q5_K": (5.2835e-07, 1.4803e-06, 3.4376e-07, 2.4254e-07),
    "Q6_K": (1.2675e-07, 3.9902e-07, 3.0437e-07, 1.8264e-07),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_error_is_not_above_llama_cpps(kind):
    for (name, x), theirs in zip(samples().items(), LLAMA_CPPS[kind.name], strict=True):
        x = x.view(-1, kind.weights)
        assert float((kind.values(fit(kind, x)) - x).double().square().mean()) <= theirs, name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_at_the_ends_of_float16_have_finite_blocks(kind):
    """Scales would overflow where those of the least squares are rounded. A step of a grid of sixteen around 0 is an
    eighth of the largest weight, and its other end a step nearer to 0; what is below the smallest scale may be 0."""
    ends = ((65500, 65500), (-65500, 65500), (65000, 65500), (-4e-7, 4e-7))
    x = torch.stack([torch.linspace(low, high, kind.weights) for low, high in ends])
    largest = (decoded(kind, fit(kind, x)) - x).abs().amax(1) / x.abs().amax(1)
    assert largest.le(torch.tensor([0.01, 0.126, 0.01, 1])).all(), largest


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_no_number_stays_in_its_block(kind):
    """Who asks for the blocks says which tensor it was."""
    x = weights(kind)
    y = x.clone()
    y[10, 3], y[11, 5], y[12] = torch.nan, -torch.inf, torch.nan
    others = [index for index in range(len(x)) if index not in (10, 11, 12)]
    assert torch.equal(kind.pack(fit(kind, y))[others], kind.pack(fit(kind, x))[others])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_that_lie_on_a_grid_are_kept(kind):
    """A block that was quantized once is what it was."""
    once = kind.values(fit(kind, weights(kind)))
    again = kind.values(fit(kind, once))
    lost = (again - once).norm(dim=1) / once.norm(dim=1).clamp(min=1e-30)
    assert float(lost.median()) < 2e-3 and float(lost[once.norm(dim=1) > 0].max()) < 0.05


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_importance_moves_the_error_to_where_it_costs_less(kind):
    x = torch.randn(128, kind.weights, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(1, kind.weights)
    importance[:, ::4] = 100.0
    errors = [(importance * (kind.values(fit(kind, x, given)) - x).square()).sum() for given in (None, importance)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_that_count_for_nothing_are_kept_all_the_same(kind):
    """Inputs that calibration never saw: their scale is free, and not what a division by 0 leaves."""
    x = weights(kind)
    importance = torch.ones_like(x)
    importance[::2] = 0
    assert torch.equal(kind.pack(fit(kind, x, importance)), kind.pack(fit(kind, x)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_size_of_all_importance_is_of_none(kind):
    """Moments of small inputs: their products would leave what fp32 tells from 0."""
    x, importance = weights(kind), torch.rand(1, kind.weights, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kind.pack(fit(kind, x, importance * 2.0**-80)), kind.pack(fit(kind, x, importance)))


def test_the_nearest_level_of_uneven_ones():
    kind = BLOCK_TYPES["IQ4_NL"]
    assert nearest(kind, torch.tensor([-500.0, -4.6, -4.4, 7.1, 500])).tolist() == [-127, -10, 1, 13, 113]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_bytes_do_not_depend_on_threads_and_pieces(three_threads):
    kind = BLOCK_TYPES["Q4_K"]
    x = weights(kind, 50).view(25, 512)
    found = block_bytes(x, kind, at_a_time=3 * 512)  # nine pieces, the last one smaller
    assert torch.get_num_threads() == 3
    assert np.array_equal(found, kind.pack(fit(kind, x.view(50, 256))).view(25, -1).numpy())


def test_a_fault_of_one_piece_is_raised(three_threads):
    def work(piece: int) -> None:
        assert torch.get_num_threads() == 1
        if piece == 4:
            raise ValueError("the fifth")

    with pytest.raises(ValueError, match="the fifth"):
        on_every_core(work, range(9))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("gguf_type", MIXTURES)
def test_a_file_holds_what_its_mixture_says(gguf_type, tmp_path):
    """Sizes that are multiples of 256; every tensor of the file lies near the merged one."""
    base = write_chat_base("llama", tmp_path / "base", hidden_size=256, intermediate_size=512)
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    half, facts = gguf_of(artifact, base, tmp_path / "half.gguf", "f16")
    file, facts = gguf_of(artifact, base, tmp_path / "model.gguf", gguf_type)
    reader, exact = gguf.GGUFReader(file), {one.name: one for one in gguf.GGUFReader(half).tensors}
    assert facts["bytes"] == file.stat().st_size < 0.55 * half.stat().st_size
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    assert MIXTURES[gguf_type].usual in kinds.values() and kinds["output.weight"] == "Q6_K"
    for tensor in reader.tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        values = gguf.dequantize(exact[tensor.name].data, exact[tensor.name].tensor_type).reshape(-1)
        # The largest of 32 normal weights is some 2.4 deviations, q4_0's step an eighth of that, its error a step over
        # the root of 12: 9 %. Weights in other places would be off by as much as they are.
        assert np.linalg.norm(found - values) <= 0.13 * np.linalg.norm(values), tensor.name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3_moe", "gemma2", "gpt2", "mixtral", "phi3"])
def test_a_file_is_read_back_as_the_checkpoint_it_was_made_from(family, tmp_path):
    """Names, layouts, experts and tied tensors, against the merged tensors themselves."""
    base = write_chat_base(family, tmp_path / "base")
    artifact = artifact_of(write_adapter(tmp_path / "adapter", base))
    file, _ = gguf_of(artifact, base, tmp_path / "model.gguf", "bf16")
    merged = merged_of(artifact, base, torch.float32)
    (tmp_path / "back").mkdir()
    read_back(merged, file, tmp_path / "back")
    found = {name: read_tensor(entry) for name, entry in Checkpoint(tmp_path / "back").items()}
    expected = dict(merged.stream_from(0))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-8, atol=2**-7 if "norm" in name else 0)
