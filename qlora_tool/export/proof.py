"""The proof that an export keeps what was learned, measured on the files before they get their name."""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.stack import attach_stack
from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.build.open import open_model
from qlora_tool.data.tokenize import Example
from qlora_tool.errors import ToolError
from qlora_tool.export.verification import Proof, Update
from qlora_tool.export.verify import Predictions, Rows, choose_rows, compare, predict, trained_loss
from qlora_tool.files.tensors import Checkpoint, give_back_freed_memory
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.config_file import read_config_file
from qlora_tool.model.devices import choose_device
from qlora_tool.model.load import attention_options, auto_class, build_skeleton
from qlora_tool.model.parameter_source import ParameterSource, tied_names
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.slots import Quantization, find_embedding_slots, find_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.sizes import memory_size
from qlora_tool.weights.modules import Adaptable, FrozenLinear
from qlora_tool.weights.quantized import KINDS, QuantizedTensor

logger = logging.getLogger(__name__)

FULL_LOGITS = 1 << 28  # bytes of a model's full logits that are kept, where its hidden states do not do


def prove(
    artifact: Artifact, folder: Path, rows: tuple[Sequence[Example], str], *, base: str, max_tokens: int = 5000,
    dtype: str | None = None,
) -> Proof:
    """Hold the files of `folder`, in plain transformers, against the live quantized base with its adapter.

    Products run in fp32 on both sides, so that what differs is what the files were rounded to. The live model comes
    first and is gone before the files are read, from the disk as they are needed: memory stays below training's.

    Args:
        artifact: what was exported.
        folder: weights, config.json and tokenizer, complete.
        rows: to compare on, and what to call them, or why there are none; see `find_rows`.
        base: what it was merged onto, `dequantized` or `original`.
        max_tokens: of these rows.
        dtype: what the weights were rounded to; None: as config.json says.
    """
    examples, source = rows
    if not examples:
        return Proof(base, dtype or _stored_as(folder), left_out=source)
    dtype = dtype or _stored_as(folder)
    try:
        if shortage := _shortage(artifact):
            return Proof(base, dtype, left_out=shortage)
        live, update, chosen, untuned = _live(artifact, folder, examples, max_tokens)
    except ToolError as error:  # the base is gone by now, say: the files are good all the same
        return Proof(base, dtype, left_out=str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Proof(base, dtype, left_out=f"out of memory: {error}")
    give_back()
    try:
        with exported_model(folder, choose_device(artifact.model.device), artifact.model.trust_remote_code) as exported:
            exported.projects_plainly = not live.full_logits
            agreement = replace(compare(live, predict(exported, chosen), chosen), untuned_loss=untuned)
    except Exception as error:  # whatever transformers meets in the files: that is what there is to be told
        logger.debug("verification failed", exc_info=True)
        return Proof(base, dtype, left_out=f"plain transformers failed on the files: {error!r}", failed=True)
    proof = Proof(base, dtype, source, agreement, update)
    if not artifact.stack:
        return proof
    summed = " + ".join(f"{one.weight:g}·{one.name}" for one in artifact.stack)
    return replace(proof, live=f"the live model (quantized base with {summed})")


def _stored_as(folder: Path) -> str:
    """The dtype that the files' config.json names, or how they are quantized."""
    config = read_config_file(folder)
    quantized = config.get("quantization_config")
    if quantized is None:
        return config.get("dtype", "float32")
    return quantized["bnb_4bit_quant_type"] if quantized.get("load_in_4bit") else "int8"


def _shortage(artifact: Artifact) -> str | None:
    """Why the live model does not fit into memory, or None. It is all that is ever held: the exported one stays on the
    disk."""
    folder = base_folder(artifact)
    trust, stored = artifact.model.trust_remote_code, None if artifact.stack else artifact.adapter
    skeleton = build_skeleton(fitting_config(read_model_config(folder, trust), stored, trust), trust)
    source = ParameterSource(skeleton, Checkpoint(folder), "cpu")
    quantization = Quantization.of(artifact.model)
    slots = find_slots(skeleton, quantization) | find_embedding_slots(skeleton, quantization)
    held = largest = 0
    for name in source.names:
        shape = source.shapes[name]
        quantized = slots[name].quantized_bytes(shape, quantization) if name in slots else None
        held += source.stored_bytes(name) if quantized is None else quantized
        largest = max(largest, math.prod(shape))
    needed = held + 3 * 4 * largest  # the largest weight in fp32, the update of it, what the files hold
    free = free_bytes(choose_device(artifact.model.device))
    if needed <= free:
        return None
    return (
        f"the live model needs {memory_size(needed)}, and {memory_size(free)} of memory are free; free some, and "
        "export again with --overwrite"
    )


def _live(
    artifact: Artifact, folder: Path, examples: Sequence[Example], max_tokens: int
) -> tuple[Predictions, Update | None, Rows, float | None]:
    """What the quantized base with its adapter predicts, what the files hold of the update, and the loss of the base
    without it; the model is gone when this returns."""
    model = open_live(artifact)
    rows = choose_rows(examples, max_tokens)
    if not model.chunked_loss:
        vocabulary = model.config.get_text_config().vocab_size
        rows = choose_rows(examples, max(1, min(max_tokens, FULL_LOGITS // (4 * vocabulary))))
    update = measure_update(model, folder, artifact.model.trust_remote_code)
    live = predict(model, rows)
    return live, update, rows, _untuned_loss(artifact, model, rows)


def _untuned_loss(artifact: Artifact, model: CausalLM, rows: Rows) -> float | None:
    """The loss without the adapter; None where the untuned model is not there any more: tensors of the base were
    replaced, or it was quantized without what the adapter took over. The adapter stays switched off."""
    gone = getattr(model.module, "quantized_without", None) is not None
    if gone or artifact.stack or artifact.adapter.replaced_tensors() or artifact.adapter.token_rows():
        return None
    for module in model.module.modules():
        if isinstance(module, Adaptable):
            module.set_adapters([])
    return trained_loss(predict(model, rows), rows)


def open_live(artifact: Artifact) -> CausalLM:
    """The quantized base with its adapter, in evaluation, its products in fp32."""
    config = artifact.model.model_copy(update={"compute_dtype": "float32"})
    model = open_model(config, None if artifact.stack else artifact.adapter)
    if artifact.stack:
        attach_stack(model.module, artifact.stack)
    model.module.requires_grad_(False).eval()  # a trained output layer's hidden states do here, too
    return model


@torch.no_grad()
def measure_update(live: CausalLM, folder: Path, trust_remote_code: bool = False) -> Update | None:
    """Hold the adapted weights in the files of `folder` against the live model's, one after the other.

    Returns:
        None where no linear weight is adapted.
    """
    skeleton = build_skeleton(read_model_config(folder, trust_remote_code), trust_remote_code)
    files = ParameterSource(skeleton, Checkpoint(folder), live.device)
    tied = {one: other for pair in tied_names(skeleton).items() for one, other in (pair, pair[::-1])}
    product = size = error = 0.0
    for name, module in live.module.named_modules():
        if not isinstance(module, FrozenLinear) or not module.active_adapters:
            continue
        own = f"{name}.weight"
        stored = files.read(own if own in files.names else tied.get(own, own))
        if isinstance(stored, QuantizedTensor):
            stored = stored.dequantize(torch.float32)
        elif module.transposed:
            stored = stored.T
        start = module.weight.dense(torch.float32)  # (out, in)
        delta = sum(adapter.delta(start) for adapter in module.adapters_in_use())
        difference = stored.float() - start
        product += _dot(difference, delta)
        size += _dot(delta, delta)
        error += float(difference.sub_(delta).square_().sum(dtype=torch.float64))
    return Update(product / size, math.sqrt(error / size)) if size else None


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


@contextmanager
def exported_model(folder: Path, device: torch.device, trust_remote_code: bool = False) -> Iterator[CausalLM]:
    """The files as plain transformers loads them, their values brought to fp32: on the card where they fit, else left
    on the disk, from where each module's weights are read as it computes."""
    config = read_model_config(folder, trust_remote_code)
    with tempfile.TemporaryDirectory() as offloaded:  # for what transformers fuses on load alone
        with _quiet():
            module = auto_class(config).from_pretrained(
                folder, dtype=torch.float32, device_map={"": _place(folder, device)}, offload_folder=offloaded,
                trust_remote_code=trust_remote_code,
                **attention_options(config),
            ).eval()  # fmt: skip
        if _stored_as(folder) in KINDS:
            _multiply_in_fp32(module)
        rotate_by_example(module)  # with the same frequencies as the live side, whatever batch came before
        yield CausalLM(module, folder, Quantization("none", False), torch.float32)


def _multiply_in_fp32(module: torch.nn.Module) -> None:
    """Of a model that bitsandbytes quantized; transformers leaves the rest of it in its own dtype."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for part in module.modules():
        if type(part).__name__ == "Linear4bit":
            part.compute_dtype = torch.float32
            part.train()  # in eval it may compute in bf16 for good on a CPU; nothing else depends on it


def _place(folder: Path, device: torch.device) -> torch.device | str:
    if _stored_as(folder) in KINDS:
        return device
    in_fp32 = sum(4 * math.prod(entry.shape) for entry in Checkpoint(folder).values())
    return device if device.type == "cuda" and 1.2 * in_fp32 < free_bytes(device) else "disk"


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no remarks: where the weights lie is meant to be so."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate.big_modeling")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def give_back() -> None:
    """Let go of a model that nobody names any more; its modules may still point at one another."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
