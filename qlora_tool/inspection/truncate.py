"""The adapter cut to the best rank R (Eckart and Young 1936): a plain LoRA, and what the cut costs on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tool._version import __version__
from qlora_tool.adapters.adapter import Adapter, EmbeddingAdapter, ExpertsAdapter
from qlora_tool.adapters.expert_names import names_in_file
from qlora_tool.adapters.peft_names import CONFIG_NAME, PREFIX, WEIGHTS_NAME, taken_for_experts
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.switch import Switch
from qlora_tool.artifacts import Artifact, base_folder, changed_base
from qlora_tool.build.open import open_model
from qlora_tool.data.examples import as_examples
from qlora_tool.data.tokenize import Example
from qlora_tool.errors import OptionError, ToolError, UserError
from qlora_tool.export.adapter_only import plain_config
from qlora_tool.export.place import refuse_taken
from qlora_tool.export.preflight import inside
from qlora_tool.export.rows import find_rows
from qlora_tool.files.atomic import replacing_folder, write_json
from qlora_tool.files.digest import sha256
from qlora_tool.files.tensors import write_all
from qlora_tool.inference.evaluation import evaluate_loss
from qlora_tool.inspection.rank import too_high
from qlora_tool.inspection.spectrum import best_factors
from qlora_tool.inspection.updates import Inspection, Opened, adapter_of, open_adapter, update_factors
from qlora_tool.methods import METHODS
from qlora_tool.model.tokenizer_files import copy_tokenizer, has_tokenizer
from qlora_tool.sizes import file_size, noun_of

_BATCH = 8  # rows of a forward pass


@dataclass(frozen=True)
class Losses:
    """The mean loss over `tokens` trained tokens of `rows`, with the whole adapter and with the cut one."""

    rows: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Truncation:
    """An adapter that was cut.

    Attributes:
        folder: where it was written.
        r: its rank, of every module.
        kept: share of the squared norm of all updates that it keeps.
        bytes_before, bytes: of the tensors' files.
        losses: None where there are no rows to measure on.
        no_losses: why there are none.
        not_in_peft: what PEFT would not read of it, or None.
    """

    folder: Path
    r: int
    kept: float
    bytes_before: int
    bytes: int
    losses: Losses | None
    no_losses: str | None
    not_in_peft: str | None = None

    def as_json(self) -> dict[str, Any]:
        losses = self.losses
        return {
            "output_dir": str(self.folder), "r": self.r, "kept": self.kept,
            "bytes_before": self.bytes_before, "bytes": self.bytes,
            "loss": None if losses is None else {
                "rows": losses.rows, "tokens": losses.tokens, "before": losses.before, "after": losses.after
            },
            "loss_left_out": self.no_losses, "not_in_peft": self.not_in_peft,
        }  # fmt: skip

    def lines(self) -> list[str]:
        lines = [f"{self.folder}: cut to rank {self.r}: {self.kept:.2%} of the update kept (Frobenius, squared); "
                 f"{file_size(self.bytes)}, {file_size(self.bytes_before)} before"]  # fmt: skip
        lines += [f"{self.folder}: {self.not_in_peft}"] if self.not_in_peft else []
        if self.losses is None:
            return [*lines, f"loss not measured: {self.no_losses}"]
        found = self.losses
        return [*lines, f"loss {found.before:.4f} before, {found.after:.4f} after ({found.after - found.before:+.4f}), "
                f"on {found.tokens:,} trained {noun_of(found.tokens, 'token')} of {found.rows}"]  # fmt: skip


def refuse_truncation(artifact: Artifact, r: int, output: Path, overwrite: bool = False) -> None:
    """Refuse what cannot be cut, before anything is computed."""
    stored = adapter_of(artifact)
    refuse_taken(output, overwrite)
    if output.exists() and output.resolve() in (stored.folder.resolve(), *stored.folder.resolve().parents):
        raise UserError(f"{output}: holds the adapter that is cut; give another --output-dir")
    if outer := inside(output, stored.folder.resolve()):
        raise UserError(f"{output}: lies in {outer}, whose adapter is cut; give an --output-dir outside of that")
    if not stored.method.additive:
        raise UserError(
            f"--truncate {r}: {artifact.name} is {stored.method.name}, whose update is not of a low rank: it rescales "
            "the whole weight; export it merged, or train with adapter.method: lora"
        )
    if stored.quantized_without is not None:
        raise UserError(
            f"--truncate {r}: {artifact.name} was trained on a base without the part that its start took out "
            f"({stored.start.get('init_lora_weights', 'pissa')}), and no adapter of a lower rank goes with that; "
            "export it merged"
        )
    if r < 1:
        raise OptionError(f"--truncate {r}: expected a rank of at least 1")


@torch.no_grad()
def truncate(artifact: Artifact, found: Inspection, r: int, output: Path, data: str | None) -> Truncation:
    """Write the adapter cut to rank `r` into `output`, and measure both on held-out rows.

    Args:
        found: what `inspect_adapter` found of it.
        data: rows; None: the run's evaluation rows.

    Raises:
        UserError: nothing to cut, or rows that cannot be read.
    """
    stored = adapter_of(artifact)
    highest = max(len(module.spectrum.values) for module in found.modules)
    if r >= highest:
        raise UserError(too_high(artifact.name, r, highest))
    rows, source = _rows(artifact, data)
    opened = open_adapter(artifact)
    tensors = cut_tensors(stored, opened, r)
    with replacing_folder(output) as temporary:
        write_all(temporary / WEIGHTS_NAME, tensors, {"format": "pt"})
        config = plain_config(stored, r, stored.base or artifact.model.name_or_path, stored.peft.get("revision"))
        config |= _on_experts(opened)
        write_json(temporary / CONFIG_NAME, config, sort_keys=True)
        if has_tokenizer(stored.folder):
            copy_tokenizer(stored.folder, stored.folder, temporary)
        if stored.provenance is not None:
            write_json(temporary / "qlora_tool.json", _provenance(stored, found, r))
    before, after = ((folder / WEIGHTS_NAME).stat().st_size for folder in (stored.folder, output))
    losses = _losses(artifact, output, rows, source) if rows else None
    linears = [name for name, layer in opened.layers.items() if type(layer) is Adapter]
    return Truncation(output, r, found.kept(r), before, after, losses, None if rows else source,
                      taken_for_experts(linears, opened.model_type))  # fmt: skip


def _rows(artifact: Artifact, data: str | None) -> tuple[Sequence[Example], str]:
    """Rows to measure on, and what to call them; none, and why, where nobody asked for them and there are none, or
    where the base that was trained on is not there."""
    try:
        rows, source = find_rows(artifact, data, key="--data")
        changed = changed_base(artifact, base_folder(artifact))
    except ToolError as error:
        if data is not None:
            raise
        return [], error.lines[0]
    return ([], changed) if changed and not artifact.base_named else (rows, source)


def cut_tensors(stored: StoredAdapter, opened: Opened, r: int) -> dict[str, Tensor]:
    """The tensors of the best LoRA of rank `r`, of scale 1, fp32, by PEFT's names; what is trained whole goes along."""
    lora = METHODS["lora"]
    tensors: dict[str, Tensor] = {}
    in_file = names_in_file({name: isinstance(layer, ExpertsAdapter) for name, layer in opened.layers.items()})
    for name, layer in opened.layers.items():
        best = [best_factors(*factors, r) for factors in update_factors(layer, opened.shapes[name])]
        best_B, best_A = (torch.stack(each) for each in zip(*best, strict=True))
        if isinstance(layer, ExpertsAdapter):
            made = layer.to_peft({"lora_A": best_A, "lora_B": best_B})
        elif isinstance(layer, EmbeddingAdapter):  # of which PEFT has the weight turned
            made = {"lora_A": best_B[0].T, "lora_B": best_A[0].T}
        else:
            made = {"lora_A": best_A[0], "lora_B": best_B[0]}
        names = type(layer).names(lora)
        tensors |= {f"{PREFIX}{in_file[name]}.{names[key]}": tensor.float().contiguous()
                    for key, tensor in made.items()}  # fmt: skip
        if (bias := layer.bias_delta()) is not None:
            tensors[f"{PREFIX}{name}.{names['lora_B_bias']}"] = bias.contiguous()
    shared = set(stored.method.saved_shared(stored.usual).values())
    beside = {key: tensor for key, tensor in stored.tensors.items() if stored.owner(key) is None and key not in shared}
    return tensors | {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in beside.items()}


def _on_experts(opened: Opened) -> dict[str, list[str]]:
    """How a configuration names the places where weights of experts are among them; else nothing."""
    experts = {name for name, layer in opened.layers.items() if isinstance(layer, ExpertsAdapter)}
    if not experts:
        return {}
    return {"target_parameters": sorted(experts), "target_modules": sorted(opened.layers.keys() - experts)}


def _provenance(stored: StoredAdapter, found: Inspection, r: int) -> dict[str, Any]:
    """What the adapter says of itself, and what it was cut from."""
    whole = {file.name: sha256(file) for file in sorted(stored.folder.glob("adapter_*"))}
    known = {key: value for key, value in (stored.provenance or {}).items() if key != "start"}  # it is plain now
    return known | {
        "method": "lora",
        "truncated": {"qlora_tool": __version__, "method": stored.method.name, "from_r": found.rank, "r": r,
                      "kept": found.kept(r), "start": stored.start or None, "files": whole},
    }  # fmt: skip


def _losses(artifact: Artifact, cut: Path, rows: Sequence[Example], source: str) -> Losses:
    """Of both adapters on one base, which is read once."""
    model = open_model(artifact.model)
    switch = Switch(model.module)
    results = {}
    for name, stored in (("before", adapter_of(artifact)), ("after", read_adapter(cut))):
        switch.add(name, stored)
        switch.use(name)
        results[name] = evaluate_loss(model, as_examples(rows), _BATCH, pad_token_id=0)
    before, after = results["before"], results["after"]
    if not all(math.isfinite(result.loss) for result in results.values()):
        raise UserError(f"{artifact.name}: the loss on {source} is not a number; inspect another adapter")
    return Losses(source, before.tokens, before.loss, after.loss)
