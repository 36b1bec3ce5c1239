"""Between the start of a forward pass and the end of backward nothing waits for the device.

Whatever a step reads off a tensor the device has to compute first, with everything that was asked of it before. On a
CPU no operator waits; those that would on a card are found by their names, in all that runs but inside an operation of
the house, and in what torch's Python functions are called for.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from test_causal_lm import ROWS, example, open_tiny
from tiny_models import FAMILIES
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tool.adapters.attach import attach
from qlora_tool.config import AdapterConfig
from qlora_tool.data.batches import Batch, collate
from qlora_tool.model import experts
from qlora_tool.model.causal_lm import CausalLM

# Operators whose result the host needs, or whose result's size depends on values.
READING = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::nonzero",
    "aten::masked_select", "aten::unique_consecutive", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::bincount", "aten::histc", "aten::repeat_interleave",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Of a CPU's tensors these read without an operator.
LEAVING = {"cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "__array__"}
ROUTED = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "ernie4_5_moe",
          "deepseek_v3", "deepseek_v32"]  # fmt: skip


class Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, given = getattr(func, "__name__", ""), (*args[1:], *(kwargs or {}).values())
        to_cpu = name == "to" and any(isinstance(one, str) and one == "cpu" for one in given)
        copied = func is torch.tensor and (kwargs or {}).get("device") is not None  # from the host, at once
        if (name in LEAVING and args and isinstance(args[0], torch.Tensor)) or to_cpu or copied:
            self.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


def waits(model: CausalLM, batch: Batch) -> list[str]:
    """What a forward and a backward pass ask of the device, and wait for."""
    found: list[str] = []
    with Functions(found), Operators(found):
        model.loss_sum(batch).backward()
    return found


def batches() -> dict[str, Batch]:
    rows = [[one] for row in ROWS for one in row]
    return {
        "full": collate([[example(12, 1)], [example(12, 2)]], pad_token_id=0, packing=False),
        "padded": collate(rows, pad_token_id=0, packing=False),
        "padding-free": collate(rows, pad_token_id=0, packing=False, padding_free=True),
        "packed": collate(ROWS, pad_token_id=0, packing=True),
    }


def ready_to_train(family: str, folder, **config) -> CausalLM:
    model = open_tiny(family, folder, kind="nf4")
    attach(model.module, AdapterConfig(r=4, **config), torch.float32, seed=0)
    model.module.train()
    return model


def copies_a_number(model: CausalLM) -> bool:
    """Whether transformers copies a number from the host for masks that are added to scores: GPT-Neo in its own code,
    all that run on `eager` up to 5.17 or so."""
    eager = model.config.get_text_config()._attn_implementation == "eager"
    return model.config.model_type == "gpt_neo" or (eager and TorchVersion(transformers.__version__) < "5.23")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ROUTED])
def test_no_family_waits_in_a_step(family, tmp_path):
    model = ready_to_train(family, tmp_path)
    model.checkpoint_layers(True)
    found = {name: set(waits(model, batch)) for name, batch in batches().items()}
    if copies_a_number(model):
        found = {name: one - {"Tensor.tensor"} for name, one in found.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize("family", ROUTED)
@pytest.mark.parametrize("together", [False, True])
def test_experts_are_all_that_is_waited_for(family, together, tmp_path, monkeypatch):
    """Once a layer: how many tokens each expert gets decides the shapes of its products."""
    monkeypatch.setattr(experts, "takes_together", lambda *_: together)
    model = ready_to_train(family, tmp_path, target_parameters=["gate_up_proj", "down_proj"])
    for name, batch in batches().items():
        found = Counter(waits(model, batch))
        if copies_a_number(model):
            del found["Tensor.tensor"]
        assert found.keys() == {"Tensor.tolist"}, name
        assert found["Tensor.tolist"] <= model.config.num_hidden_layers


@pytest.mark.parametrize("method", ["dora", "loha"])
def test_no_method_waits_in_a_step(method, tmp_path):
    model = ready_to_train("llama", tmp_path, method=method)
    assert waits(model, batches()["packed"]) == []


def test_waiting_would_be_noticed(tmp_path):
    """The tests above can fail: each of these waits on a card."""
    tensor = torch.arange(4.0)
    model = open_tiny("llama", tmp_path)
    for look in (float, bool, torch.Tensor.tolist, torch.Tensor.nonzero, lambda x: x[x > 1], lambda x: x.to("cpu"),
                 lambda x: x.masked_select(x > 1), lambda x: torch.repeat_interleave(x, torch.ones(4, dtype=int)),
                 lambda x: torch.tensor(1.0, device=x.device)):  # fmt: skip
        found: list[str] = []
        with Functions(found), Operators(found):
            look(tensor[:1] if look in (float, bool) else tensor)
        assert found, look
    batch = batches()["full"]
    found = []
    with Functions(found), Operators(found):  # without what is known of the batch, transformers looks
        model.module(input_ids=batch.input_ids, position_ids=torch.arange(12).unsqueeze(0), use_cache=False)
    assert "aten::_local_scalar_dense" in found or "Tensor.__bool__" in found


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_card_is_never_waited_for(family, tmp_path):
    """As the driver sees it: `set_sync_debug_mode` raises where something waits."""
    model = ready_to_train(family, tmp_path)
    model.checkpoint_layers(True)
    assert model.device.type == "cuda"
    there = [batch.to("cuda") for batch in batches().values()]
    for batch in there:  # tables, kernels and workspaces are made
        model.loss_sum(batch).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in there:
            model.loss_sum(batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
