"""Made-up memory of a QLoRA step, of the shape of a real one, for tests and for looking at what is drawn."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_tool.memory.breakdown import Breakdown, MemoryReport
from qlora_tool.memory.trace.timeline import Event, Timeline

MIB = 2**20


def step_events(layers: int = 32, accumulation: int = 1) -> Iterator[Event]:
    """A model about the size of a 7B at 1 × 2048 tokens with checkpointing: load, then steps of three phases."""
    yield Event("other_weights", 250 * MIB, "load", "model.embed_tokens", "aten::empty")
    for layer in range(layers):
        for name, share in (("self_attn.q_proj", 1), ("self_attn.o_proj", 1), ("mlp.up_proj", 3), ("mlp.down_proj", 3)):
            module = f"model.layers.{layer}.{name}"
            yield Event("temporaries", 24 * MIB * share, "load", module, "aten::_to_copy")
            yield Event("base_weights", 12 * MIB * share, "load", module, "bitsandbytes::quantize_4bit")
            yield Event("quantization_state", 400_000 * share, "load", module, "bitsandbytes::quantize_4bit")
            yield Event("temporaries", -24 * MIB * share, "load", module, "aten::_to_copy")
    yield Event("other_weights", 250 * MIB, "load", "lm_head", "aten::empty")
    yield Event("adapter_weights", 76 * MIB, "load", "model", "aten::empty")
    yield Event("framework", 16 * MIB, "load", "", "cublas workspace")
    yield Event("optimizer_state", 152 * MIB, "load", "", "aten::zeros_like")
    for _ in range(accumulation):
        yield from _forward(layers)
        yield from _backward(layers)
    yield Event("temporaries", 20 * MIB, "optimizer", "", "aten::_foreach_norm")
    yield Event("temporaries", -20 * MIB, "optimizer", "", "aten::_foreach_norm")
    yield Event("gradients", -4 * MIB * min(layers, 19) * accumulation, "optimizer", "", "zero_grad")


def _forward(layers: int) -> Iterator[Event]:
    for layer in range(layers):
        yield Event("boundaries", 16 * MIB, "forward", f"model.layers.{layer}", "aten::add")
        yield from _layer(layer, "forward", "temporaries")
    yield Event("saved", 33 * MIB, "forward", "model.norm", "aten::mul")
    yield Event("temporaries", 250 * MIB, "forward", "lm_head", "aten::mm")


def _layer(layer: int, phase: str, kind: str) -> Iterator[Event]:
    held = 0
    for name, size in (("self_attn.q_proj", 16), ("self_attn", 16), ("mlp.up_proj", 43), ("mlp.act_fn", 43)):
        module = f"model.layers.{layer}.{name}"
        yield Event("temporaries", 32 * MIB, phase, module, "bitsandbytes::dequantize_4bit")
        yield Event(kind, size * MIB, phase, module, "aten::mm")
        yield Event("temporaries", -32 * MIB, phase, module, "bitsandbytes::dequantize_4bit")
        held += size
    yield Event(kind, -held * MIB, phase, f"model.layers.{layer}.mlp", "aten::mm")


def _backward(layers: int) -> Iterator[Event]:
    yield Event("temporaries", 500 * MIB, "backward", "loss", "aten::_log_softmax_backward_data")
    yield Event("temporaries", -750 * MIB, "backward", "lm_head", "aten::mm")
    yield Event("saved", -33 * MIB, "backward", "model.norm", "aten::mul")
    for layer in reversed(range(layers)):
        yield from _layer(layer, "backward", "recomputed")
        yield Event("boundaries", -16 * MIB, "backward", f"model.layers.{layer}", "aten::add")
        if layer < 19:
            yield Event("gradients", 4 * MIB, "backward", f"model.layers.{layer}", "aten::mm")


def step_timeline(layers: int = 32, accumulation: int = 1) -> Timeline:
    return Timeline.from_events(step_events(layers, accumulation))


CONFIG = {
    "model": {"name_or_path": "demo", "quantization": "nf4", "double_quant": True},
    "adapter": {"method": "lora", "r": 16, "target_modules": "all-linear"},
    "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
}


def step_report() -> MemoryReport:
    """Predicted as the timeline has it; measured with 12.5 MB more of temporaries, and less kept unused."""
    predicted = step_timeline().breakdown(reserved_bytes=6188 * MIB, context_bytes=420_000_000)
    more = 12_500_000
    measured = Breakdown(
        predicted.peak_bytes + more,
        5991 * MIB,
        420_000_000,
        predicted.at_peak | {"temporaries": predicted.at_peak["temporaries"] + more},
        predicted.activations,
        predicted.phase_peak_bytes | {"backward": predicted.phase_peak_bytes["backward"] + more},
    )
    return MemoryReport("cuda", CONFIG, predicted, measured)
