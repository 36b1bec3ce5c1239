"""The end of a run: which adapter is kept, and what came of it; and who is told of its steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qlora_tool.adapters.as_written import list_files
from qlora_tool.adapters.peft_files import save_adapter
from qlora_tool.adapters.starts import ELSEWHERE, readme
from qlora_tool.files.atomic import replacing_folder, write_json, write_text
from qlora_tool.model.tokenizer_files import save_tokenizer
from qlora_tool.training.best import describe_best, load_best
from qlora_tool.training.outcome import judge
from qlora_tool.training.prepare import provenance
from qlora_tool.training.progress import folder_gone
from qlora_tool.training.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def finish(run: Run) -> None:
    """Choose the adapter to keep, and say what came of the run."""
    progress, best = run.progress, run.progress.best
    if progress.step < run.plan.total_steps and best is not None:
        count = progress.evaluations_since_best
        logger.info("stopped early, after step %d of %d: %s no better than %s %.4f after step %d", progress.step,
                    run.plan.total_steps, "1 evaluation was" if count == 1 else f"{count} evaluations were",
                    best.metric, best.value, best.step)  # fmt: skip
    if run.training.load_best_model_at_end:
        run.world.on_main(lambda: load_best(progress, run.adapters, run.folder))
        for parameter in run.adapters.parameters():
            run.world.copy_from_first(parameter.data)
    if (line := describe_best(progress, run.config)) is not None:
        logger.info(line)
    run.outcome = judge(run.adapters, progress.untuned, run.world.on_main(run.kept_losses),
                        run.sampled_loss)  # fmt: skip
    for warning in run.outcome.warnings:
        logger.warning(warning)


def start_trackers(run: Run) -> Accelerator | None:
    """The trackers of `report_to`; None where there are none."""
    if not (names := run.training.report_to):
        return None
    from accelerate import Accelerator

    # It only writes: the device is none of its business, and of one process it takes one answer for good.
    accelerator = Accelerator(cpu=True, log_with=names, project_dir=run.folder.path)
    flat = {f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for section, values in run.config.model_dump().items() for key, value in values.items()}  # fmt: skip
    accelerator.init_trackers("qlora-tool", flat)
    return accelerator


def save_trained(run: Run) -> None:
    """The adapter in PEFT's format, with the tokenizer and our provenance beside it."""
    base = run.config.model.name_or_path
    if not run.folder.holds_run():
        raise folder_gone(run.folder.path)
    with replacing_folder(run.folder.adapter) as temporary:
        save_tokenizer(run.data.tokenizer, run.data.tokenizer_folder, temporary)
        save_adapter(
            temporary, run.adapters, run.config.adapter, run.model.module,
            str(run.model.folder) if base == "demo" else base, run.config.model.revision,
        )  # fmt: skip
        facts = provenance(run.config, run.model, run.data) | {"step": run.kept_step}
        write_json(temporary / "qlora_tool.json", facts)
        if text := readme(run.config.adapter, run.config.model.quantization):
            write_text(temporary / "README.md", text)
            logger.warning(ELSEWHERE, run.config.adapter.init_lora_weights)  # type: ignore[attr-defined]
        list_files(temporary)
