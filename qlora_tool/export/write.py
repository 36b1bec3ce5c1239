"""Export a fine-tuned model: checked first, grown in a hidden folder, proven, and named only when it is whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from qlora_tool._version import __version__
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.choices import ComputeDtype, ExportBase, ExportFormat, GgufType
from qlora_tool.errors import MachineError, UserError, did_you_mean
from qlora_tool.export.dtypes import Choice, Unfit, choices, refuse_unfit
from qlora_tool.export.encoding import Calibration, Encoder
from qlora_tool.export.formats import BITSANDBYTES, FORMATS, Job
from qlora_tool.export.gguf.mixture import MIXTURES
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.model_card import model_card
from qlora_tool.export.preflight import (
    finer_base,
    refuse_changed_base,
    refuse_full_disk,
    refuse_inputs,
    refuse_no_adapter,
    refuse_taken,
    refuse_unmergeable,
    warn_of_rounding_away,
)
from qlora_tool.export.staging import Staging, staged_folder, written_so_far
from qlora_tool.files.atomic import write_json, write_text
from qlora_tool.files.hashes import file_hashes, sha256
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.inference.ends import generation_settings
from qlora_tool.model.cached_base import cached_base
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.tokenizer_check import is_misread
from qlora_tool.model.tokenizer_files import read_templates

if TYPE_CHECKING:
    from qlora_tool.data.tokenize import Example
    from qlora_tool.export.rows import CalibrationRows
    from qlora_tool.export.verification import Proof

logger = logging.getLogger(__name__)

VERIFIED_TOKENS = 5000  # at most
CHOICES = {  # of what `ExportOptions` takes
    "base": get_args(ExportBase), "dtype": get_args(ComputeDtype), "format": get_args(ExportFormat),
    "gguf_type": get_args(GgufType),
}  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        base: dequantized, original, or auto: dequantized, and for codes of few bits whichever keeps more.
        dtype: auto (see `dtypes.choices`), bfloat16, float16 or float32.
        max_shard_size: bytes of a file at most.
        overwrite: an existing folder may be replaced.
        format: a key of `formats.FORMATS`.
        gguf_type: of `choices.GgufType`.
        verify: hold the files against the live model before they get their name.
        verify_data: rows for that; None: the run's own.
        with_base: beside a GGUF adapter, write the base that it was trained on as a GGUF file.
        calibration: what codes of few bits are made with: auto (the rows that the run trained on), none, or a file.

    Raises:
        UserError: a value that is not one of these.
    """

    base: str = "auto"
    dtype: str = "auto"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    format: str = "safetensors"
    gguf_type: str = "f16"
    verify: bool = False
    verify_data: str | None = None
    with_base: bool = False
    calibration: str = "auto"

    @property
    def has_codes(self) -> bool:
        """Whether weights become codes of few bits."""
        return self.format in BITSANDBYTES or (self.format == "gguf" and self.gguf_type in MIXTURES)

    def __post_init__(self) -> None:
        faults = [
            f"--{name.replace('_', '-')}: expected one of {', '.join(names)}, found {getattr(self, name)!r}"
            f"{did_you_mean(str(getattr(self, name)), names)}"
            for name, names in CHOICES.items()
            if getattr(self, name) not in names
        ]
        if faults:
            raise UserError(faults)


@dataclass(frozen=True)
class ExportResult:
    """What was exported, and how it was proven.

    Attributes:
        folder: that was written.
        format: a key of `formats.FORMATS`.
        files: those with weights, in the folder.
        bytes: of their tensors.
        dtype: of the weights; a quantized format's own name for it, None for an adapter.
        dtype_reason: why that one; None where the format leaves no choice.
        base: dequantized or original; of codes, what they started from.
        seconds: for all of it.
        proof: how the files compare with the model that was trained; None where nothing was compared.
        not_verified: why nothing was, None where something was.
        facts: all that `--json` writes.
        uploaded: the address on the hub, where it was uploaded.
    """

    folder: Path
    format: str
    files: tuple[str, ...]
    bytes: int
    dtype: str | None
    dtype_reason: str | None
    base: str
    seconds: float
    proof: Proof | None
    not_verified: str | None
    facts: dict[str, Any]
    uploaded: str | None = None


def export_merged(artifact: Artifact, output: Path, options: ExportOptions) -> ExportResult:
    """Merge an adapter into its base and write the result to `output`, whole or not at all.

    Killed at any moment and called again with the same arguments, it goes on where it stopped, and the result is the
    same, byte for byte.

    Raises:
        UserError: nothing to merge, an existing folder, an adapter for another base, rows that cannot be read, values
            beyond the dtype.
        MachineError: not enough space, known before the first byte.
    """
    started = time.perf_counter()
    refuse_no_adapter(artifact)
    refuse_unmergeable(artifact, options.format)
    _refuse_options(options)
    refuse_taken(output, options.overwrite)
    folder = base_folder(artifact)
    adapters = {f"the adapter {one.name}": one.stored.folder for one in artifact.stack}
    refuse_inputs(output, {"the base": folder, **(adapters or {"the adapter": artifact.adapter.folder})})
    generation_settings(folder)  # a fault of the file is told before anything is written
    rows, calibration = _rows(artifact, options), _calibration_rows(artifact, options)
    changed = refuse_changed_base(artifact, folder)
    job = _job(artifact, folder, output, options, calibration)
    if changed:  # told only now: an adapter that does not fit at all is one line
        logger.warning(changed)
    form = FORMATS[options.format]
    form.check(job)
    place = output.resolve()
    inputs = _inputs(artifact, folder, options, calibration)
    _choose(job.merged, _choices(job, options)[0], options)
    refuse_full_disk(output, form.nbytes(job), written_so_far(place, inputs))
    if options.has_codes:
        _say_how(job, options, calibration)
    with closing(job.encoder), staged_folder(place, inputs) as staging:
        choice, written = _write(job, options, staging)
        staging.keep = True
        result = {
            "output_dir": str(output),
            "format": options.format,
            "dtype": str(job.merged.default_dtype).removeprefix("torch.") if form.has_dtype else None,
            "dtype_reason": choice.reason if form.has_dtype else None,
            "base": job.merged.base,
            **written,
        }
        if encoding := result.get("encoding"):
            result["base"] = encoding["started_from"]
        proof = _proof(job, staging, options, rows, result)
        result["verification"] = proof.as_dict() if proof else {"left_out": _no_proof(options)}
        write_json(staging.folder / "qlora_tool.json", _provenance(artifact, options, result))
        write_json(staging.folder / "export.json", _report(artifact, folder, options, result))
        card = model_card(
            artifact, folder, result, chat=bool(read_templates(job.tokenizer_folder)),
            misread=is_misread(staging.folder), proof=proof,
        )  # fmt: skip
        write_text(staging.folder / "README.md", card)
    facts = result | {"seconds": round(time.perf_counter() - started, 2)}
    return ExportResult(
        output, options.format, tuple(facts["files"]), facts["bytes"], facts["dtype"], facts["dtype_reason"],
        facts["base"], facts["seconds"], proof, proof.left_out if proof else _no_proof(options), facts,
    )  # fmt: skip


def _refuse_options(options: ExportOptions) -> None:
    if not FORMATS[options.format].has_dtype and options.dtype != "auto":
        instead = "; give --gguf-type" if options.format == "gguf" or options.with_base else ""
        raise UserError(f"--dtype {options.dtype}: --format {options.format} has dtypes of its own{instead}")
    if options.with_base and options.format != "gguf-adapter":
        raise UserError(f"--with-base: is for --format gguf-adapter, not {options.format}; give both, or none")
    if options.format == "gguf-adapter" and not options.with_base and options.gguf_type != "f16":
        raise UserError(f"--gguf-type {options.gguf_type}: is of the base's file, which --with-base writes; give both, "
                        "or none: the adapter's is f32")  # fmt: skip
    if not options.format.startswith("gguf") and options.gguf_type != "f16":
        raise UserError(
            f"--gguf-type {options.gguf_type}: is for --format gguf, not {options.format}; give both, or none"
        )
    if not options.has_codes and options.calibration not in ("auto", "none"):
        raise UserError(
            f"--calibration {options.calibration}: is for codes of few bits ({', '.join(BITSANDBYTES)}, and gguf of "
            f"type {', '.join(MIXTURES)}); choose one of these, or leave it out"
        )
    if options.calibration not in ("auto", "none") and not Path(options.calibration).exists():
        raise UserError(f"--calibration {options.calibration}: no such file; expected auto, none or a file of rows")
    if options.verify_data is not None and not Path(options.verify_data).exists():
        raise UserError(f"--verify-data {options.verify_data}: no such file")


def _job(
    artifact: Artifact, folder: Path, output: Path, options: ExportOptions, calibration: CalibrationRows | str
) -> Job:
    trust = artifact.model.trust_remote_code
    base = "dequantized" if options.base == "auto" else options.base
    quantization = Quantization.of(artifact.model)
    stored = None if artifact.stack else artifact.adapter
    merged = MergedModel(
        build_skeleton(fitting_config(read_model_config(folder, trust), stored, trust), trust), Checkpoint(folder),
        quantization, artifact.adapter,
        base, cached=find_cached_base(folder, quantization), stack=artifact.stack,
    )  # fmt: skip
    both = options.has_codes and options.base == "auto" and finer_base(artifact, folder)
    moments = None if isinstance(calibration, str) else Calibration(merged, calibration, trust)
    encoder = Encoder(merged, ["dequantized", "original"] if both else [base], moments)
    return Job(output.resolve().name, artifact, folder, merged, options.max_shard_size, options.gguf_type, encoder,
               options.with_base)  # fmt: skip


def _calibration_rows(artifact: Artifact, options: ExportOptions) -> CalibrationRows | str:
    """What codes are made with, or why with nothing."""
    if not options.has_codes:
        return "no codes"
    from qlora_tool.export.rows import calibration_rows

    return calibration_rows(artifact, options.calibration)


def _say_how(job: Job, options: ExportOptions, calibration: CalibrationRows | str) -> None:
    """What the codes are made with, before the work starts; and where nothing helps them, what that costs."""
    if not isinstance(calibration, str):
        logger.info("codes are made with %s tokens of %s", f"{calibration.tokens:,}", calibration.source)
    elif options.calibration == "none":
        warn_of_rounding_away(job.artifact, job.base_folder, options.format, job.encoder.bases)
    else:
        logger.warning("--calibration auto: %s; codes are the nearest ones", calibration)


def find_cached_base(folder: Path, quantization: Quantization) -> Checkpoint | None:
    """The quantized base that a run cached, whatever its dtype of matrix products: the codes are the same."""
    found = (cached_base(folder, quantization, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16))
    return next((cached for cached in found if cached is not None), None)


def _choices(job: Job, options: ExportOptions) -> list[Choice]:
    form = FORMATS[options.format]
    if not form.has_dtype:
        return [Choice(torch.float32, "")]  # which the format itself rounds
    if options.dtype == "auto" and not form.auto_dtype:
        return [Choice(None, "the base's own")]
    config = job.merged.skeleton.config
    kinds = (config.model_type, config.get_text_config().model_type)
    return choices(options.dtype, job.merged.stored_dtype, kinds)


def _choose(merged: MergedModel, choice: Choice, options: ExportOptions) -> None:
    merged.dtype, merged.keeps_wider = choice.dtype, choice.keeps_wider
    merged.refuse_coarse = options.dtype == "auto"


def _write(job: Job, options: ExportOptions, staging: Staging) -> tuple[Choice, dict[str, Any]]:
    """Fill the staging folder in the best dtype that holds every value, which shows as the values are made."""
    possible = _choices(job, options)
    for index in range(staging.notes.get("choice", 0), len(possible)):
        choice = possible[index]
        if "unfit" in staging.notes:
            choice = Choice(choice.dtype, f"{choice.reason}: {staging.notes['unfit']}", choice.keeps_wider)
        _choose(job.merged, choice, options)
        try:
            return choice, FORMATS[options.format].write(job, staging)
        except Unfit as fault:
            if index + 1 == len(possible):
                raise refuse_unfit(_all_unfit(job.merged), f"--dtype {options.dtype}") from fault
            logger.info("float16 does not fit: %s %s; starting again in bfloat16", fault.name, fault.how)
            staging.note(choice=index + 1, unfit=f"{fault.name} {fault.how}")
            staging.start_anew()
    raise AssertionError("unreachable: the last choice returns or raises")


def _all_unfit(merged: MergedModel) -> list[Unfit]:
    """Every tensor that does not fit, worst first as far as they have a number; makes them all, and writes none."""
    found = []
    for group in merged.groups:
        try:
            merged.tensors(group)
        except Unfit as fault:
            found.append(fault)
    return sorted(found, key=lambda fault: -fault.largest)


def _rows(artifact: Artifact, options: ExportOptions) -> tuple[Sequence[Example], str] | None:
    """What the files will be verified on; None where they are not. Read first: a broken file costs nothing then."""
    if not options.verify or FORMATS[options.format].as_model is None:
        return None
    from qlora_tool.export.rows import find_rows
    from qlora_tool.export.verify import first_examples

    examples, source = find_rows(artifact, options.verify_data)
    return first_examples(examples, VERIFIED_TOKENS), source


def _proof(
    job: Job, staging: Staging, options: ExportOptions, rows: tuple[Sequence[Example], str] | None,
    result: dict[str, Any],
) -> Proof | None:
    """How the files compare with the live model. What quantizing again keeps of the update is known in any case."""
    loss = result.get("requantization")
    if rows is None and loss is None:
        return None
    from qlora_tool.export.verification import Proof, Update

    if rows is None:
        proof = Proof(result["base"], options.format, left_out=_no_proof(options))
    else:
        proof = _proven(job, staging, options, rows, result["base"])
    if loss is None:
        return proof
    known = Update(loss["update_kept"], loss["relative_error"]) if loss["adapted_weights"] else None
    finer = finer_base(job.artifact, job.base_folder)
    return replace(proof, update=proof.update or known, finer_base=finer)


def _proven(
    job: Job, staging: Staging, options: ExportOptions, rows: tuple[Sequence[Example], str], base: str
) -> Proof:
    from qlora_tool.export.proof import prove
    from qlora_tool.export.verification import Proof

    named = options.gguf_type if options.format == "gguf" or options.with_base else None
    named = "float32" if options.format == "gguf-adapter" and not options.with_base else named
    as_model = FORMATS[options.format].as_model
    assert as_model is not None
    try:
        with as_model(job, staging) if rows[0] else nullcontext(staging.folder) as model:
            return prove(job.artifact, model, rows, base=base, max_tokens=VERIFIED_TOKENS, dtype=named)
    except MachineError as error:  # no space to read the file back
        return Proof(base, named or options.format, left_out=str(error))


def _no_proof(options: ExportOptions) -> str:
    if not options.verify:
        return "not asked for"
    return "nothing was merged: it is the adapter that was trained"


def _inputs(
    artifact: Artifact, folder: Path, options: ExportOptions, calibration: CalibrationRows | str
) -> dict[str, Any]:
    """All that the large files depend on; the small ones are written anew each time."""
    adapter = artifact.adapter.folder
    asked = {key: value for key, value in asdict(options).items() if key not in ("overwrite", "verify", "verify_data")}
    return {
        "versions": [__version__, torch.__version__],
        "adapter": {file.name: sha256(file) for file in sorted(adapter.glob("adapter_*"))},
        **({"stack": stack_facts(artifact)} if artifact.stack else {}),
        "tokenizer": {file.name: sha256(file) for file in sorted(adapter.glob("tokenizer*"))},
        "base": file_hashes(folder),
        "quantization": asdict(Quantization.of(artifact.model)),
        "options": asked,
        **({} if isinstance(calibration, str) else {"calibration": calibration.digest()}),
    }


def stack_facts(artifact: Artifact) -> list[dict[str, Any]]:
    """What a weighted sum was made of: every adapter with its weight, its files and its data."""
    return [
        {
            "name": one.name, "weight": one.weight, "method": one.stored.method.name,
            "files": {file.name: sha256(file) for file in sorted(one.stored.folder.glob("adapter_*"))},
            "data": (one.stored.provenance or {}).get("data"),
        }
        for one in artifact.stack
    ]  # fmt: skip


def _provenance(artifact: Artifact, options: ExportOptions, result: dict[str, Any]) -> dict[str, Any]:
    """What the adapter says of itself, and what it was merged onto in fact: the command line may have named another."""
    known = artifact.adapter.provenance or {"method": artifact.adapter.method.name}
    base = {"name_or_path": artifact.model.name_or_path, "revision": artifact.model.revision}
    return known | {
        "base": known.get("base", {}) | base,
        "quantization": artifact.model.quantization,
        "double_quant": artifact.model.double_quant,
        "embeddings": artifact.model.embeddings,
        "skip_modules": artifact.model.skip_modules,
        "merged": {"base": result["base"], "dtype": result["dtype"]},
        **({"method": "sum", "data": None, "stack": stack_facts(artifact)} if artifact.stack else {}),
    }


def _report(artifact: Artifact, folder: Path, options: ExportOptions, result: dict[str, Any]) -> dict[str, Any]:
    """`export.json`: what was exported from what, and how well. Nothing that differs from one run to the next."""
    known = artifact.adapter.provenance or {}
    adapter = artifact.adapter.folder
    asked = {key: value for key, value in asdict(options).items() if key != "overwrite"}
    return {
        "schema": 1,
        "qlora_tool": __version__,
        "options": asked,
        **{key: value for key, value in result.items() if key not in ("output_dir", "verification")},
        "provenance": {
            "base": {
                "name_or_path": artifact.model.name_or_path,
                "revision": artifact.model.revision,
                "quantization": artifact.model.quantization,
                "double_quant": artifact.model.double_quant,
                "embeddings": artifact.model.embeddings,
                "skip_modules": artifact.model.skip_modules,
                "files": file_hashes(folder),
            },
            "adapter": None if artifact.stack else {
                "method": artifact.adapter.method.name,
                "files": {file.name: sha256(file) for file in sorted(adapter.glob("adapter_*"))},
            },
            **({"stack": stack_facts(artifact)} if artifact.stack else {}),
            "data": None if artifact.stack else known.get("data"),
        },
        "verification": result["verification"],
    }
