"""Export a fine-tuned model: checked first, grown in a hidden folder, proven, and named only when it is whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.adapters.resized import fitting_config
from qlora_tool.artifacts import Artifact, base_folder
from qlora_tool.errors import MachineError, UserError
from qlora_tool.export.beside import MODEL_FILES
from qlora_tool.export.dtypes import Choice, Unfit, choices, refuse_unfit
from qlora_tool.export.encoding import Calibration, Encoder
from qlora_tool.export.formats import FORMATS, Job
from qlora_tool.export.merge import MergedModel
from qlora_tool.export.model_card import model_card
from qlora_tool.export.options import ExportOptions, refuse_options
from qlora_tool.export.place import refuse_taken
from qlora_tool.export.preflight import (
    finer_base,
    refuse_changed_base,
    refuse_full_disk,
    refuse_inputs,
    refuse_no_adapter,
    refuse_unmeasurable,
    refuse_unmergeable,
    warn_of_rounding_away,
)
from qlora_tool.export.report import inputs_of, provenance_of, report_of
from qlora_tool.export.staging import REPORT, Staging, staged_folder, written_so_far
from qlora_tool.export.verify import LEAST_GAIN
from qlora_tool.files.atomic import write_json, write_text
from qlora_tool.files.tensors import Checkpoint
from qlora_tool.inference.ends import generation_settings
from qlora_tool.model.cached_base import cached_base
from qlora_tool.model.checkpointing import decoder_layers
from qlora_tool.model.load import build_skeleton
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.tokenizer_check import is_misread
from qlora_tool.model.tokenizer_files import files_to_copy, read_templates

if TYPE_CHECKING:
    from qlora_tool.data.tokenize import Example
    from qlora_tool.export.rows import CalibrationRows
    from qlora_tool.export.verification import Proof

logger = logging.getLogger(__name__)

VERIFIED_TOKENS = 5000  # at most
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

    Example:
        >>> from qlora_tool import export_merged
        >>> result = export_merged("my-run", "my-fp32-model", dtype="float32", verify=False, overwrite=True)
        >>> result.format, result.files, result.dtype, result.proof
        ('safetensors', ('model.safetensors',), 'float32', None)
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
    refuse_options(options)
    refuse_taken(output, options.overwrite)
    folder = base_folder(artifact)
    adapters = {f"the adapter {one.name}": one.stored.folder for one in artifact.stack}
    refuse_inputs(output, {"the base": folder, **(adapters or {"the adapter": artifact.adapter.folder})})
    generation_settings(folder)  # a fault of the file is told before anything is written
    files_to_copy(folder, MODEL_FILES)
    rows, calibration = _rows(artifact, options), _calibration_rows(artifact, options)
    changed = refuse_changed_base(artifact, folder)
    asked, options = options, options.candidates[-1]  # the largest, for what is to be refused
    if len(asked.candidates) > 1:
        refuse_unmeasurable(artifact, asked.choosing, rows)
    job = _job(artifact, folder, output.resolve().name, options, calibration)
    if changed:  # told only now: an adapter that does not fit at all is one line
        logger.warning(changed)
    form = FORMATS[options.format]
    form.check(job)
    place = output.resolve()
    inputs = inputs_of(artifact, folder, asked, calibration, rows)
    _choose(job.merged, _choices(job, options)[0], options)
    refuse_full_disk(output, form.nbytes(job), written_so_far(place, inputs))
    if asked.has_codes:
        _say_how(job, asked, calibration)
    with staged_folder(place, inputs) as staging:
        job, result, proof = _first_that_keeps_enough(job, asked, staging, rows, calibration)
        result = {"output_dir": str(output)} | result
        write_json(staging.folder / "qlora_tool.json", provenance_of(artifact, result))
        report = report_of(artifact, folder, asked, result)
        card = model_card(
            artifact, folder, result, chat=bool(read_templates(job.tokenizer_folder)),
            misread=is_misread(staging.folder), proof=proof,
        )  # fmt: skip
        write_text(staging.folder / "README.md", card)
        files = [path.relative_to(staging.folder).as_posix() for path in staging.folder.rglob("*") if path.is_file()]
        write_json(staging.folder / REPORT, report | {"written": sorted({*files, REPORT})})
    facts = result | {"seconds": round(time.perf_counter() - started, 2)}
    return ExportResult(
        output, options.format, tuple(facts["files"]), facts["bytes"], facts["dtype"], facts["dtype_reason"],
        facts["base"], facts["seconds"], proof, proof.left_out if proof else _no_proof(options), facts,
    )  # fmt: skip


def _first_that_keeps_enough(
    job: Job, asked: ExportOptions, staging: Staging, rows: tuple[Sequence[Example], str] | None,
    calibration: CalibrationRows | str,
) -> tuple[Job, dict[str, Any], Proof | None]:
    """Make the one export that is asked for, or of several the smallest that keeps enough of what training gained."""
    candidates, tried = asked.candidates, list(staging.notes.get("tried", ()))
    for options in candidates[len(tried) :]:
        if options is not asked:
            job = _job(job.artifact, job.base_folder, job.name, options, calibration)
        result, proof = _made(job, options, staging, rows)
        if len(candidates) == 1:
            return job, result, proof
        assert proof is not None
        found = proof.agreement
        kept = found and found.gain_kept
        if kept is None:
            staging.keep = False  # nothing that could be gone on from
            raise UserError(f"{asked.choosing}: {_not_known(proof)}; name a type, without --min-kept")
        tried.append({"gguf_type": options.gguf_type, "bytes": result["bytes"], "gain_kept": round(kept, 4),
                      "mean_kl": float(f"{found.mean_kl:.4g}")})  # fmt: skip
        if kept >= asked.least_kept:
            break
        rest = "trying the next larger type" if options is not candidates[-1] else "there is no larger one"
        logger.info("%s keeps %.2f%% of what training gained, less than %.4g%%: %s", options.gguf_type, 100 * kept,
                    100 * asked.least_kept, rest)  # fmt: skip
        staging.start_anew()
        staging.note(tried=tried)
    else:
        most = max(tried, key=lambda one: one["gain_kept"])["gguf_type"]
        logger.warning("no type keeps %.4g%% of what training gained; %s keeps most", 100 * asked.least_kept, most)
        options = next(one for one in candidates if one.gguf_type == most)
        job = _job(job.artifact, job.base_folder, job.name, options, calibration)
        result, proof = _made(job, options, staging, rows)
    return job, result | {"candidates": tried}, proof


def _not_known(proof: Proof) -> str:
    """Why it cannot be told what a file keeps."""
    if proof.left_out is not None:
        return f"what a type keeps cannot be measured: {proof.left_out}"
    return f"training gained less than {LEAST_GAIN} in loss on these rows"


def _made(
    job: Job, options: ExportOptions, staging: Staging, rows: tuple[Sequence[Example], str] | None
) -> tuple[dict[str, Any], Proof | None]:
    """Fill the staging folder with weights, and prove them."""
    with closing(job.encoder):
        choice, written = _write(job, options, staging)
    staging.keep = True
    result = {
        "format": options.format,
        "dtype": str(job.merged.default_dtype).removeprefix("torch.") if options.has_dtype else None,
        "dtype_reason": choice.reason if options.has_dtype else None,
        "base": job.merged.base,
        **written,
    }
    if encoding := result.get("encoding"):
        result["base"] = encoding["started_from"]
    proof = _proof(job, staging, options, rows, result)
    result["verification"] = proof.as_dict() if proof else {"left_out": _no_proof(options)}
    return result, proof


def _job(
    artifact: Artifact, folder: Path, name: str, options: ExportOptions, calibration: CalibrationRows | str
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
    moments = None
    if options.has_codes and not isinstance(calibration, str):
        try:
            moments = Calibration(merged, calibration, trust)
        except UserError:  # of a family without layers that are known
            if options.calibration != "auto":
                raise
    encoder = Encoder(merged, ["dequantized", "original"] if both else [base], moments)
    return Job(name, artifact, folder, merged, options.max_shard_size, options.gguf_type, encoder,
               options.with_base)  # fmt: skip


def _calibration_rows(artifact: Artifact, options: ExportOptions) -> CalibrationRows | str:
    """What codes are made with, or why with nothing."""
    if not options.has_codes:
        return "no codes"
    from qlora_tool.export.rows import calibration_rows

    return calibration_rows(artifact, options.calibration)


def _say_how(job: Job, options: ExportOptions, calibration: CalibrationRows | str) -> None:
    """What the codes are made with, before the work starts; and where nothing helps them, what that costs."""
    if not isinstance(calibration, str) and not decoder_layers(job.merged.skeleton):
        calibration = "no decoder layers are found in this family's models"
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
    if not options.has_dtype:
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
    if (result.get("encoding") or {}).get("calibration"):
        proof = replace(proof, update=None)  # codes make good one another's errors: single weights tell nothing
    elif loss is not None and loss["adapted_weights"]:
        proof = replace(proof, update=proof.update or Update(loss["update_kept"], loss["relative_error"]))
    if loss is None:
        return proof
    return replace(proof, finer_base=finer_base(job.artifact, job.base_folder), unquantized=loss["left_unquantized"])


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


