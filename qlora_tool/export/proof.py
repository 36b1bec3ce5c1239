"""The proof that an export keeps what was learned, measured on the files before they get their name."""

from __future__ import annotations

import gc
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.stack import attach_stack
from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.build import open_model
from qlora_tool.config import DataConfig
from qlora_tool.config.sources import told
from qlora_tool.data.examples import Selection, as_examples
from qlora_tool.data.tokenize import Example, build_dataset, build_evaluation_sets, evaluation_sources
from qlora_tool.errors import ToolError
from qlora_tool.export.verify import Agreement, Predictions, Rows, choose_rows, compare, predict, trained_loss
from qlora_tool.files.tensors import Checkpoint, give_back_freed_memory
from qlora_tool.inference.open import tokenizer_folder
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.devices import choose_device
from qlora_tool.model.load import attention_options, auto_class, build_skeleton
from qlora_tool.model.open import open_tokenizer, positions_of
from qlora_tool.model.parameter_source import ParameterSource, tied_names
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.slots import Quantization, find_embedding_slots, find_slots
from qlora_tool.model.source import read_model_config
from qlora_tool.ops.free_memory import free_bytes
from qlora_tool.weights.modules import Adaptable, FrozenLinear
from qlora_tool.weights.quantized import KINDS, QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MEAN_KL = 1e-3  # from here on a mean KL is a warning: seven times what bf16's rounding gives (docs/measurements/cpu.md)
ARGMAX_AGREEMENT = 0.95  # below it
UPDATE_ERROR = 0.5  # from here on: the rounding is half as large as the update
GAIN_KEPT = 0.9  # of what training gained; below it
GGUF_TYPES = ("q4_0", "iq4_nl", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "bf16", "f16")  # each finer than the last
FULL_LOGITS = 1 << 28  # bytes of a model's full logits that are kept, where its hidden states do not do


@dataclass(frozen=True)
class Update:
    """What the files hold of the update Δ of the adapted weights W₀, all of them together.

    Attributes:
        kept: ⟨W − W₀, Δ⟩ / ‖Δ‖², W being the files'.
        error: ‖W − (W₀ + Δ)‖ / ‖Δ‖. Near 1 means that the update drowns in it.
    """

    kept: float
    error: float

    def __str__(self) -> str:
        size = f"{self.error:.2g} times" if self.error >= 1 else f"{self.error * 100:.2g}% of"
        return f"{self.kept:.2%}, with a rounding error of {size} its size"


@dataclass(frozen=True)
class Proof:
    """How the files compare with the live quantized base with its adapter; or why that was not measured.

    Attributes:
        base, dtype: of the files.
        rows: what both models were shown.
        agreement, update: the figures; None where there are none.
        left_out: why verification was left out, else None. `update` may be known all the same.
        failed: whether it was left out because the files could not be run.
        live: what it was held against, in words.
        finer_base: whether `--base original` would merge onto finer weights than the 4-bit values trained against.
    """

    base: str
    dtype: str
    rows: str | None = None
    agreement: Agreement | None = None
    update: Update | None = None
    left_out: str | None = None
    failed: bool = False
    finer_base: bool = False
    live: str = "the trained model (quantized base with its adapter)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures in four digits, which do not change from one run to the next."""
        figures: dict[str, Any] = {"left_out": self.left_out}
        if self.agreement:
            found = asdict(self.agreement) | {"gain_kept": self.agreement.gain_kept}
            figures |= {"rows": self.rows, **{key: _rounded(value) for key, value in found.items()}}
        if self.agreement or self.update:
            update = {key: _rounded(value) for key, value in asdict(self.update).items()} if self.update else None
            figures |= {"update": update, "warnings": self.warnings()}
        return figures

    def lines(self) -> list[str]:
        """For the terminal."""
        kept = [f"  update kept {self.update}"] if self.update else []
        if self.left_out is not None:
            return [f"not verified: {self.left_out}", *kept]
        found = self.agreement
        lines = [
            f"{'compared with' if self.warnings() else 'verified against'} {self.live} on {found.tokens:,} tokens of "
            f"{self.rows}",
            f"  KL divergence {found.mean_kl:.2g} nats on average, {found.worst_kl:.2g} at worst (0: the same); the "
            f"same likeliest token at {found.argmax_agreement:.2%}",
        ]
        losses = [f"{live:.4f} trained, {exported:.4f} exported ({of})" for live, exported, of in self._losses()]
        if losses:
            lines.append(f"  loss {'; '.join(losses)}")
        if found.gain_kept is not None:
            lines.append(f"  of what training gained (loss {found.untuned_loss:.2f} → {found.live_loss:.2f}) the files "
                         f"keep {found.gain_kept:.1%}")  # fmt: skip
        return lines + kept

    def table(self) -> list[tuple[str, str]]:
        """For the model card."""
        facts = []
        if found := self.agreement:
            facts += [
                ("rows", f"{found.tokens:,} tokens of {self.rows}"),
                ("KL divergence", f"{found.mean_kl:.2g} nats on average, {found.worst_kl:.2g} at worst"),
                ("same likeliest token", f"{found.argmax_agreement:.2%}"),
                *((f"loss, {of}", f"{live:.4f} trained, {exported:.4f} exported")
                  for live, exported, of in self._losses()),
            ]  # fmt: skip
            if found.gain_kept is not None:
                gained = f"loss {found.untuned_loss:.2f} → {found.live_loss:.2f}"
                facts.append(("kept of what training gained", f"{found.gain_kept:.1%} ({gained})"))
        if self.update:
            facts.append(("update kept", str(self.update)))
        return facts

    def _losses(self) -> list[tuple[float, float, str]]:
        found = self.agreement
        pairs = [(found.live_loss, found.exported_loss, f"{found.trained_tokens} trained tokens"),
                 (found.live_loss_all, found.exported_loss_all, "every token")]  # fmt: skip
        return [pair for pair in pairs if pair[0] is not None]

    def warnings(self) -> list[str]:
        """What is bad about the figures, each with the better choice."""
        found, faults = self.agreement, []
        if self.dtype in GGUF_TYPES[:-2] and found and found.gain_kept is not None:  # what counts of a coarse rounding
            if found.gain_kept >= GAIN_KEPT:
                return []
            return [f"of what training gained the file keeps {found.gain_kept:.1%} (below {GAIN_KEPT:.0%}); "
                    f"{self._better()}"]  # fmt: skip
        if found and not found.mean_kl <= MEAN_KL:  # no number at all is bad too
            faults.append(f"mean KL {found.mean_kl:.2g} (above {MEAN_KL:g})")
        if found and not found.argmax_agreement >= ARGMAX_AGREEMENT:
            faults.append(f"the same likeliest token at {found.argmax_agreement:.1%} (below {ARGMAX_AGREEMENT:.0%})")
        if self.update and not self.update.error <= UPDATE_ERROR:
            faults.append(f"a rounding error of {self.update.error:.2g} times the update's size (above "
                          f"{UPDATE_ERROR:g})")  # fmt: skip
        failed = [self.left_out] if self.failed else []
        if not faults:
            return failed
        found = "the exported model is not quite the one that was trained"
        if self.update and self.dtype in KINDS:
            found = f"update kept {self.update.kept:.1%} through rounding to {self.dtype} again"
        return [*failed, f"{found}: {', '.join(faults)}; {self._better()}"]

    def _better(self) -> str:
        if self.dtype in GGUF_TYPES[:-1]:
            return f"--gguf-type {GGUF_TYPES[GGUF_TYPES.index(self.dtype) + 1]} is the next finer type"
        if self.dtype in KINDS:
            original = "--base original keeps more of it, " if self.finer_base and self.base == "dequantized" else ""
            return f"{original}--format safetensors keeps all of it"
        if self.base == "original":
            return "--base dequantized merges onto the weights that were trained against"
        if self.dtype == "bfloat16":
            return "--dtype float16 rounds eight times finer, where the values fit; --dtype float32 does not round"
        if self.dtype == "float16":
            return "--dtype float32 does not round"
        return "no other choice would be closer: please report this with the model's family"


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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantized = config.get("quantization_config")
    if quantized is None:
        return config.get("dtype", "float32")
    return quantized["bnb_4bit_quant_type"] if quantized.get("load_in_4bit") else "int8"


def find_rows(
    artifact: Artifact, data: str | None, key: str = "--verify-data"
) -> tuple[Sequence[Example], str]:
    """The rows to compare on, and what to call them: of `data`; else of the run's evaluation sets; else, where it has
    none, the rows it trained on, which tell as well whether two models agree.

    Args:
        key: the option that `data` is given by.

    Returns:
        No rows, and why, where there are none to be had.

    Raises:
        UserError: `data` cannot be read.
    """
    model = base_folder(artifact)
    tokenizer = open_tokenizer(tokenizer_folder(model, artifact.adapter), artifact.model.trust_remote_code)
    if artifact.run is not None:
        settings = artifact.run.data  # as it is: which rows a fraction takes depends on max_length, too
    else:
        config = read_model_config(model, artifact.model.trust_remote_code)
        settings = DataConfig()
        limit = positions_of(config) or settings.max_length
        settings = settings.model_copy(update={"max_length": min(settings.max_length, limit)})
    if data is not None:
        return build_dataset(data, settings, tokenizer, key=key).examples, data
    if artifact.run is None:
        return [], f"the adapter comes without its run, and so without rows; give some with {key} FILE"
    try:
        return _rows_of_run(settings, tokenizer, artifact.run.training.seed)
    except ToolError as error:
        return [], f"the run's data cannot be read ({error}); give rows with {key} FILE"


def _rows_of_run(
    settings: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Sequence[Example], str]:
    if settings.eval is None:
        examples = build_dataset(settings.train, settings, tokenizer, seed=seed).examples
        return examples, f"{told(settings.train)} (trained on: the run has no evaluation rows)"
    splits_off = not evaluation_sources(settings)
    train = build_dataset(settings.train, settings, tokenizer, seed=seed) if splits_off else None
    _, sets = build_evaluation_sets(settings, tokenizer, train, seed=seed)
    found = Selection([as_examples(dataset.examples) for dataset in sets.values()])
    return found, ", ".join(f"{dataset.report.source} (evaluation)" for dataset in sets.values())


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
        f"the live model needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; free some, and "
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


def _rounded(value: Any) -> Any:
    """A figure in four digits; None for one that is not a number, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
