"""How to export: the options, what they may be, and which go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from qlora_tool.choices import ComputeDtype, ExportBase, ExportFormat, GgufType
from qlora_tool.errors import UserError, did_you_mean, meant_share
from qlora_tool.export.types import ADAPTER_ALONE, BITSANDBYTES, GGUF_TYPES, MIXED, WITH_DTYPE
from qlora_tool.sizes import file_size

AUTO_KEPT = 0.95  # of what training gained, where the type is chosen and the user names no share
SHARD_SIZE = 5 * 10**9
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
        min_kept: of what training gained; of GGUF's types the smallest that keeps so much is taken, from `gguf_type` on
            where one is named.
        calibration: what codes of few bits are made with: auto (the rows that the run trained on), none, or a file.

    Raises:
        UserError: a value that is not one of these.
    """

    base: str = "auto"
    dtype: str = "auto"
    max_shard_size: int = SHARD_SIZE
    overwrite: bool = False
    format: str = "safetensors"
    gguf_type: str = "f16"
    verify: bool = False
    verify_data: str | None = None
    with_base: bool = False
    calibration: str = "auto"
    min_kept: float | None = None

    @property
    def has_codes(self) -> bool:
        """Whether weights become codes of few bits, in what is made or in one of the candidates."""
        return self.format in BITSANDBYTES or (
            self.format == "gguf" and any(one.gguf_type in MIXED for one in self.candidates)
        )

    @property
    def merges(self) -> bool:
        """Whether the base's weights are read for what is made."""
        return self.with_base or self.format not in ("adapter", "adapter-portable", "gguf-adapter")

    @property
    def has_dtype(self) -> bool:
        """Whether the user may choose a dtype for its tensors."""
        return self.format in WITH_DTYPE

    @property
    def least_kept(self) -> float:
        """Of what training gained, where there are several candidates."""
        return AUTO_KEPT if self.min_kept is None else self.min_kept

    @property
    def choosing(self) -> str:
        """The option that asks for a choice, as it was given."""
        return "--gguf-type auto" if self.gguf_type == "auto" else f"--min-kept {self.least_kept:g}"

    @property
    def candidates(self) -> list[ExportOptions]:
        """The exports to try, smallest first, until one keeps enough; itself where there is nothing to choose."""
        if self.format != "gguf" or (self.gguf_type != "auto" and self.min_kept is None):
            return [self]
        # f16 is what there is where no type is named, and the largest: from there nothing could be chosen.
        first = 0 if self.gguf_type in ("auto", "f16") else GGUF_TYPES.index(self.gguf_type)
        types = [kind for kind in GGUF_TYPES[first:] if kind != "bf16" or self.gguf_type == kind]
        return [replace(self, gguf_type=kind, min_kept=None) for kind in types]

    def __post_init__(self) -> None:
        faults = [
            f"--{name.replace('_', '-')}: expected one of {', '.join(names)}, found {getattr(self, name)!r}"
            f"{did_you_mean(str(getattr(self, name)), names)}"
            for name, names in CHOICES.items()
            if getattr(self, name) not in names
        ]
        if faults:
            raise UserError(faults)


def refuse_options(options: ExportOptions) -> None:
    """Refuse options that do not go together, or name what is not there.

    Raises:
        UserError: each with the cure.
    """
    if not options.has_dtype and options.dtype != "auto":
        instead = "; give --gguf-type" if options.format == "gguf" or options.with_base else ""
        raise UserError(f"--dtype {options.dtype}: --format {options.format} has dtypes of its own{instead}")
    if options.with_base and options.format != "gguf-adapter":
        raise UserError(f"--with-base: is for --format gguf-adapter, not {options.format}; give both, or none")
    if options.format == "gguf-adapter" and not options.with_base and options.gguf_type != "f16":
        raise UserError(f"--gguf-type {options.gguf_type}: is of the base's file, which --with-base writes; give both, "
                        "or none: the adapter's is f32")  # fmt: skip
    types = ("gguf", "gguf-adapter") if options.gguf_type != "auto" else ("gguf",)
    if options.format not in types and options.gguf_type != "f16":
        raise UserError(
            f"--gguf-type {options.gguf_type}: is for --format gguf, not {options.format}; give both, or none"
        )
    _refuse_without_effect(options)
    if not options.has_codes and options.calibration not in ("auto", "none"):
        raise UserError(
            f"--calibration {options.calibration}: is for merged files of few bits (--format "
            f"{', '.join(BITSANDBYTES)}, and gguf of type {', '.join(MIXED)}); choose one of these, or leave it out"
        )
    if options.calibration not in ("auto", "none") and not (options.calibration and Path(options.calibration).exists()):
        raise UserError(f"--calibration {options.calibration}: no such file; expected auto, none or a file of rows")
    if options.verify_data is not None and not Path(options.verify_data).exists():
        raise UserError(f"--verify-data {options.verify_data}: no such file")
    if options.min_kept is not None and options.format != "gguf":
        raise UserError(f"--min-kept {options.min_kept:g}: chooses between GGUF's types; set --format gguf, or leave "
                        "it out")  # fmt: skip
    if options.min_kept is not None and not 0 < options.min_kept <= 1:
        raise UserError(f"--min-kept {options.min_kept:g}: expected a share of what training gained, above 0, at most "
                        f"1{meant_share(options.min_kept) or ', such as 0.95'}")  # fmt: skip
    if len(options.candidates) > 1 and not options.verify:
        raise UserError(f"{options.choosing}: what a type keeps is measured by verification; leave out --no-verify")


def _refuse_without_effect(options: ExportOptions) -> None:
    """Refuse what the format has no use for: left alone, it would be ignored in silence."""
    form, alone = options.format, options.format in ADAPTER_ALONE
    if alone and options.base != "auto":
        raise UserError(f"--base {options.base}: --format {form} writes the adapter alone, merged onto no base; leave "
                        "it out, or choose --format safetensors, gguf, nf4 or fp4")  # fmt: skip
    if options.max_shard_size != SHARD_SIZE and form not in WITH_DTYPE:
        raise UserError(
            f"--max-shard-size {file_size(options.max_shard_size)}: --format {form} writes no shards; leave it out, or "
            f"choose --format {', '.join(WITH_DTYPE[:-1])} or {WITH_DTYPE[-1]}"
        )
    if options.verify_data is not None and alone:
        raise UserError(f"--verify-data {options.verify_data}: --format {form} writes the adapter that was trained, "
                        "and nothing is compared; leave it out, or choose a format that merges")  # fmt: skip
    if options.verify_data is not None and not options.verify:
        raise UserError(f"--verify-data {options.verify_data}: nothing is verified with --no-verify; leave one of them "
                        "out")  # fmt: skip
