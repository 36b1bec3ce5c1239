"""`training.full_determinism`, on rows so long that attention's backward pass differs from run to run without it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rehearsal import REHEARSAL
from tiny_runs import adapter_bytes, run_config, write_model

from qlora_tool.data.batches import Segments
from qlora_tool.model.segments import SegmentMask, segment_attention
from qlora_tool.ops.determinism import full_determinism
from qlora_tool.training.loop import train

pytestmark = pytest.mark.cuda
HALF = "float32" if REHEARSAL else "bfloat16"
REPEATED = 3 if REHEARSAL else 8


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """A model with 1024 positions, and rows that nearly fill them."""
    folder = tmp_path_factory.mktemp("long")
    model = write_model(folder / "model", hidden_size=256, intermediate_size=512, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024)  # fmt: skip
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(str(k * n) for k in range(140))} for n in range(2, 10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, folder / "rows.jsonl"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 2048, 128), (4, 8, 1024, 64), (1, 2, 8192, 128)])
def test_attention_gives_the_same_gradients_each_time(device, shape, packed):
    made = torch.Generator().manual_seed(0)
    rows, heads, length, width = (*shape[:2], 64, 16) if REHEARSAL else shape
    query, key, value, grad = (
        torch.randn(rows, heads, length, width, generator=made).to(device, getattr(torch, HALF)) for _ in range(4)
    )
    for tensor in (query, key, value):
        tensor.requires_grad_()
    segments = Segments.of([length] * rows if rows > 1 else [length - length // 4, length // 4])
    mask = SegmentMask(replace(segments, offsets=segments.offsets.to(device)), None) if packed else None
    found = []
    with full_determinism(True):
        for _ in range(REPEATED):
            output, _ = segment_attention(torch.nn.Module(), query, key, value, mask, is_causal=True)
            found.append(torch.autograd.grad(output, (query, key, value), grad.transpose(1, 2)))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("values", [
    {"data.packing": False}, {"data.packing": True}, {"data.packing": False, "training.optim": "adamw_8bit"},
    {"data.packing": True, "adapter.method": "dora", "model.quantization": "int8"},
    {"data.packing": False, "model.weights": "host", "training.offload_boundaries": True},
    {"data.packing": True, "adapter.target_modules": ["q_proj", "lm_head"], "adapter.trainable_token_indices": [5, 7]},
], ids=lambda values: ",".join(str(value) for value in values.values()))  # fmt: skip
def test_two_runs_and_one_that_was_resumed_are_the_same(long_rows, tmp_path, device, values):
    common = {"model.device": device.type, "model.compute_dtype": HALF, "data.max_length": 1024, "adapter.r": 16,
              "training.full_determinism": True, "training.gradient_checkpointing": True, "training.save_steps": 2,
              "training.max_steps": 4, "training.per_device_train_batch_size": 2}  # fmt: skip
    for name in ("one", "two"):
        train(run_config(*long_rows, tmp_path / name, common | values))
    moved = ("model.weights", "training.offload_boundaries")
    resident = {key: value for key, value in values.items() if key not in moved}
    train(run_config(*long_rows, tmp_path / "two", common | resident),
          resume=str(tmp_path / "two" / "checkpoints" / "step-000002"))  # fmt: skip
    assert adapter_bytes(tmp_path / "two") == adapter_bytes(tmp_path / "one")
