"""What the commands do, as functions: each takes what its command takes, by name, and returns a typed result.

    result = train("demo", set={"training.max_steps": 20}, output_dir="runs/demo")
    export_merged(result.folder, "merged/demo")

Configurations are files, names of recipes, mappings of sections or `Config` objects. All of these functions raise
`UserError` where the command ends with exit code 2 and `MachineError` where it ends with 1; its `lines` say what to do.
Heavy libraries are imported when a function is called and what it was given is in order.
"""

from __future__ import annotations

import json as _json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from qlora_tool.collection import without_collection
from qlora_tool.config import Config, ModelConfig, load_config, parse_size, with_values
from qlora_tool.config.doubts import doubts
from qlora_tool.config.places import refuse_as_model, refuse_as_run
from qlora_tool.config.recipes import refuse_no_data
from qlora_tool.config.sources import sources_of
from qlora_tool.errors import AlreadyFinished, OptionError, UserError
from qlora_tool.files import results
from qlora_tool.files.results import Read, new_file
from qlora_tool.files.weight_files import refuse_no_weights
from qlora_tool.inference.options import checked_adapters, refuse_together
from qlora_tool.model.source import local_folder
from qlora_tool.terminal import waiting

if TYPE_CHECKING:
    from qlora_tool.artifacts import Artifact, BaseOptions
    from qlora_tool.export.write import ExportResult
    from qlora_tool.inference.generate import GenerateResult, PromptAnswer
    from qlora_tool.inference.score import EvaluateResult
    from qlora_tool.inspection.inspect import InspectResult
    from qlora_tool.memory.allocator.cards import Budget
    from qlora_tool.memory.profile_run import MemoryProfile
    from qlora_tool.reporting.page import ReportResult
    from qlora_tool.training.preview import PreviewResult
    from qlora_tool.training.result import TrainResult

logger = logging.getLogger(__name__)

__all__ = ["evaluate", "export_merged", "generate", "inspect", "preview", "profile_memory", "report", "train"]

AnyPath = str | os.PathLike[str]
AnyConfig = AnyPath | Mapping[str, Any] | Config
Overrides = Sequence[str] | Mapping[str, Any]
Adapters = Sequence[str] | Mapping[str, AnyPath]


def train(
    config: AnyConfig,
    *,
    set: Overrides = (),
    output_dir: AnyPath | None = None,
    resume: AnyPath = "auto",
    extend: bool = False,
    allow_changes: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> TrainResult:
    """Train an adapter on a quantized base, and leave a run's folder behind.

    Memory is predicted before the weights are read: on CUDA a run that will not fit is refused.

    Args:
        config: a configuration.
        set: keys that are to have other values: `{"training.max_steps": 20}`, or `["training.max_steps=20"]`.
        output_dir: the run's folder, in the place of `training.output_dir`.
        resume: auto (go on with this folder's unfinished run), never, or a checkpoint's or run's folder.
        extend: train the folder's run for longer: with a larger `max_steps` or `num_train_epochs` it goes on from its
            last checkpoint.
        allow_changes: go on though data, base, template, version or keys that change a run's numbers are others.
        overwrite: replace a run that the folder holds, which is kept until the new one is done.
        dry_run: check everything, read data and model, and stop before the first step; nothing is written.

    Raises:
        UserError: the configuration, the data or the model is at fault, or the run will not fit.
        MachineError: the disk, the network or the device is, or the loss is not a number.
        Interrupted: SIGINT or SIGTERM asked to stop; a checkpoint was saved, and its `lines` say how to go on.

    Example:
        >>> from qlora_tool import train
        >>> result = train("my-run.yaml", set={"training.max_steps": 4}, output_dir="my-run", overwrite=True)
        >>> result.steps, result.adapter.name
        (4, 'adapter')
    """
    configuration = _configuration(config, _with_output_dir(set, output_dir))
    if extend and (overwrite or os.fspath(resume) == "never"):
        other = "--overwrite" if overwrite else "--resume never"
        raise OptionError(f"--extend goes on with a run and {other} replaces it: give one of the two")
    started = time.perf_counter()
    _refuse_no_data(config, configuration)
    local_folder(configuration.model.name_or_path)
    refuse_no_weights(configuration.model.name_or_path)
    from qlora_tool.data.check import check_data
    from qlora_tool.run_folder import RunFolder
    from qlora_tool.training.going_on import refuse_to_start

    try:
        refuse_to_start(configuration, os.fspath(resume), overwrite, extend, allow_changes)
        check_data(configuration.data)
        with without_collection():
            from qlora_tool.memory.plan.again import typed
            from qlora_tool.memory.run_report import RunMemory
            from qlora_tool.training.loop import train as run_training
            from qlora_tool.training.result import TrainResult

        with typed(config, set):
            run = run_training(
                configuration, resume=os.fspath(resume), extend=extend, overwrite=overwrite, dry_run=dry_run,
                watcher=RunMemory(), allow_changes=allow_changes,
            )  # fmt: skip
    except AlreadyFinished as error:
        folder = RunFolder(Path(configuration.training.output_dir))
        if not dry_run and not error.told_elsewhere and not folder.has_ended():
            from qlora_tool.reporting.page import complete_finished

            complete_finished(folder.path)
        raise
    result = TrainResult.of(run, time.perf_counter() - started, finished=not dry_run)
    if dry_run or not run.world.is_main:
        return result
    from qlora_tool.reporting.page import report_of_finished

    return replace(result, report=report_of_finished(result.folder))


def preview(
    config: AnyConfig,
    *,
    set: Overrides = (),
    rows: int = 5,
    all: bool = False,
    json: AnyPath | None = None,
) -> PreviewResult:
    """Show rows as the model will see them, and count what becomes of the data.

    The tokenizer and the data are read, no weights. The rows are the first that training takes.

    Args:
        config: a configuration.
        set: keys that are to have other values; see `train`.
        rows: how many rows to show.
        all: count over all rows, and pack all of them; else the first 2,000 of each file, which takes seconds.
        json: where to write rows and counts.

    Raises:
        UserError: the configuration, the data or the tokenizer is at fault.
        MachineError: the hub is out of reach.

    Example:
        >>> from qlora_tool import preview
        >>> found = preview("my-run.yaml", rows=1)
        >>> len(found.rows), found.max_length
        (1, 64)
    """
    configuration = _configuration(config, set)
    if rows < 0:
        raise OptionError(f"--rows: expected at least 0, found {rows}")
    file = new_file("--json", json, results.PREVIEW, _read_by(config, configuration))
    _refuse_no_data(config, configuration)
    if not (Path(configuration.model.name_or_path).expanduser() / "tokenizer_config.json").exists():
        local_folder(configuration.model.name_or_path)  # a tokenizer alone will do
    from qlora_tool.data.check import check_data

    check_data(configuration.data, seconds=0.2)  # the rows that are shown are read again, with the same checks
    with without_collection():
        from qlora_tool.training.preview import preview as look

    result = look(configuration, rows, every_row=all)
    _write_json(file, result.as_json())
    return result


def profile_memory(
    config: AnyConfig,
    *,
    set: Overrides = (),
    device: str | None = None,
    device_memory: str | int | None = None,
    processes: int = 1,
    measure: bool = False,
    plan: bool = False,
    calibrate: bool = False,
    json: AnyPath | None = None,
    plot: AnyPath | None = None,
    on_profile: Callable[[MemoryProfile], None] | None = None,
) -> MemoryProfile:
    """Predict where every byte of a run goes, without weights, data or a GPU.

    Full batches of `data.max_length` tokens are assumed.

    Args:
        config: a configuration.
        set: keys that are to have other values; see `train`.
        device: cuda or cpu; None: cuda, unless the configuration says cpu.
        device_memory: what must suffice: a size such as 24GB, bytes, or a card such as rtx-4090; for a plan, by default
            what the device that is here has free.
        processes: that train together, each on a device like this one, or all on this CPU, which they share; the bytes
            are those of one of them.
        measure: also run real steps, on random weights, on the device that is here.
        plan: also look for what fits into `device_memory`: lengths, batches, checkpointing, quantization.
        calibrate: first measure the context and the workspaces of the card that is here, for later predictions too.
        json: where to write the breakdown, and the plan where one is asked for.
        plot: where to draw the step's memory over time: a .png or .html file.
        on_profile: told the profile before a plan is looked for, which may take minutes.

    Raises:
        UserError: the configuration, the model or an option is at fault, or the base's weights alone exceed
            `device_memory`.
        NothingFits: nothing that the plan tried fits; a `UserError`.
        MachineError: the hub is out of reach.

    Example:
        >>> from qlora_tool import profile_memory
        >>> found = profile_memory("my-run.yaml", device="cuda", device_memory="24GB")
        >>> found.fits, found.predicted.peak_bytes < found.predicted.needed_bytes <= found.budget_bytes
        (True, True)
    """
    configuration = _configuration(config, set)
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"--device: expected cuda or cpu, found {device!r}")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise UserError(f"--processes: expected a whole number of at least 1, found {processes!r}")
    if processes > 1 and measure:
        raise OptionError("--measure runs one process, and not several; leave --processes out, or start the run itself "
                          "with torchrun: its memory.json has the measured bytes of one of them")  # fmt: skip
    if plot is not None and Path(plot).suffix not in (".png", ".html"):
        raise OptionError(f"invalid value for --plot: {os.fspath(plot)}: expected a name that ends in .png or .html")
    local_folder(configuration.model.name_or_path)
    read = _read_by(config, configuration)
    file = new_file("--json", json, results.MEMORY, read)
    picture = new_file("--plot", plot, results.MEMORY_PLOT, read.and_file("--json", file))
    device = device or ("cpu" if configuration.model.device == "cpu" else "cuda")
    from qlora_tool.memory.allocator.cards import named_budget
    from qlora_tool.workers import Workers, count_for

    named = named_budget(device_memory, device)

    # On a card, as on a CPU each process would measure that for itself; they start while this one imports, too, so that
    # one that has imported makes an answer alone.
    others = count_for(1 << 30) - 1 if device == "cuda" and (plan or "torch" not in sys.modules) else 0
    with Workers("qlora_tool.memory.plan.planner:call", others if plan else min(1, others), "predicts") as workers:
        with waiting("predicting memory"):
            with without_collection():
                from qlora_tool.memory.plan.again import typed
                from qlora_tool.memory.profile_run import NothingFits, draw, planned, profile_run

            budget = _budget(configuration, device, named, plan)
            with typed(config, set, device_memory):
                profiled = profile_run(configuration, device, budget, measure=measure, calibrate=calibrate,
                                       may_change=plan, processes=processes, workers=workers)  # fmt: skip
        if on_profile is not None:
            on_profile(profiled)
        _write_json(file, profiled.to_json())
        if picture is not None:
            draw(picture, profiled)
        if not plan:
            return profiled
        try:
            profiled = planned(profiled, workers)
        except NothingFits as error:
            _write_json(file, error.profile.to_json())
            _draw_plan(picture, error.profile)
            raise
    _write_json(file, profiled.to_json())
    _draw_plan(picture, profiled)
    return profiled


def _draw_plan(picture: Path | None, profiled: MemoryProfile) -> None:
    """Draw a page anew, now with the plan; a picture has none."""
    if picture is not None and picture.suffix == ".html":
        from qlora_tool.memory.profile_run import draw

        draw(picture, profiled)


def _budget(config: Config, device: str, named: Budget | None, plan: bool) -> Budget | None:
    """The device that must suffice; None: what is free on the one that is here, if any."""
    if named is not None or not plan or config.training.max_memory is not None:
        return named
    from qlora_tool.memory.allocator.available import budget_here

    budget = budget_here(device)
    if budget is None:
        raise OptionError("--plan needs to know what must suffice: no card is here; give --device-memory, such as "
                          "24GB or rtx-4090, or --device cpu")  # fmt: skip
    return budget


def export_merged(
    run_or_adapter: AnyPath,
    output_dir: AnyPath,
    *,
    adapter: Adapters = (),
    base: str = "auto",
    dtype: str = "auto",
    format: str = "safetensors",
    gguf_type: str = "f16",
    min_kept: float | None = None,
    with_base: bool = False,
    calibration: AnyPath | None = "auto",
    max_shard_size: str | int = "5GB",
    verify: bool = True,
    verify_data: AnyPath | None = None,
    overwrite: bool = False,
    json: AnyPath | None = None,
    push_to_hub: str | None = None,
    model: AnyPath | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
    on_written: Callable[[ExportResult], None] | None = None,
) -> ExportResult:
    """Merge an adapter into its base: W = dequantize(W₄) + Δ, a model that plain transformers loads.

    Killed at any moment and called again with the same arguments, it goes on where it stopped.

    Args:
        run_or_adapter: a run's folder, or an adapter's, ours or PEFT's.
        output_dir: where the model goes; it must not exist.
        adapter: adapters to add, each times a weight, 1 where there is none: `["sums=runs/sums:0.7"]`, or
            `{"sums": "runs/sums:0.7"}`. Where `run_or_adapter` is one too it has weight 1; it may also be their base.
        base: dequantized (merge onto what was trained against), original (onto the 16-bit weights) or auto: the first,
            and for codes of few bits whichever keeps more.
        dtype: auto, bfloat16, float16 or float32; auto takes what keeps more.
        format: safetensors, gguf, gguf-adapter, adapter, adapter-portable, nf4 or fp4.
        gguf_type: of `choices.GgufType`; auto: the smallest that keeps `min_kept`.
        min_kept: of what training gained: the smallest GGUF type from `gguf_type` on that keeps so much; 0.95 for auto.
        with_base: beside a GGUF adapter, write the base that it was trained on as a GGUF file.
        calibration: what codes of few bits are made with: auto (the rows that the run trained on), none, or a file.
        max_shard_size: of one file at most, such as 5GB, or bytes.
        verify: hold the files against the model that was trained, token by token, before they get their name.
        verify_data: rows for that; None: the run's evaluation rows.
        overwrite: replace an existing folder.
        json: where to write what was done.
        push_to_hub: upload the folder, too, as OWNER/NAME.
        model, quantization, double_quant: the base of an adapter that does not say it all.
        on_written: told the result before it is uploaded.

    Raises:
        UserError: nothing to merge, an existing folder, an adapter for another base, an option at fault.
        MachineError: not enough space, or the hub is out of reach; the folder stays then.

    Example:
        >>> from qlora_tool import export_merged
        >>> result = export_merged("my-run", "my-model", verify_data="rows.jsonl", overwrite=True)
        >>> result.files, result.proof.agreement.argmax_agreement
        (('model.safetensors',), 1.0)
    """
    try:
        size = parse_size(max_shard_size)
    except UserError as error:
        raise UserError(f"--max-shard-size: {error}") from error
    if push_to_hub:
        from qlora_tool.export.upload import refuse_bad_name

        refuse_bad_name(push_to_hub)
    checked_adapters(adapter, weighted=True)
    rows = None if verify_data is None else os.fspath(verify_data)
    data = {"the data of --verify-data": rows, "the data of --calibration": calibration}
    read = Read(data, {"the folder of --output-dir": output_dir, **_models(run_or_adapter, model, adapter)})
    file = new_file("--json", json, results.EXPORTED, read)
    if rows is not None:
        from qlora_tool.data.check import check_sources

        check_sources([rows], run=run_or_adapter)
    refuse_as_model(os.fspath(run_or_adapter), adapter=not adapter)
    from qlora_tool.export.options import ExportOptions, refuse_options
    from qlora_tool.export.place import refuse_taken

    exporting = ExportOptions(
        base, dtype, size, overwrite, format, gguf_type, verify, rows, with_base,
        "none" if calibration is None else os.fspath(calibration), min_kept,
    )  # fmt: skip
    refuse_options(exporting)
    refuse_taken(Path(output_dir), overwrite)
    if model is not None and exporting.merges:
        refuse_no_weights(os.fspath(model))
    options = _base_options(model, quantization, double_quant)
    from qlora_tool.inference.named import find_named

    artifact = find_named(run_or_adapter, options, adapter=adapter, weighted=True).summed()
    with without_collection():
        from qlora_tool.export.upload import push_to_hub as upload
        from qlora_tool.export.write import export_merged as export

    result = export(artifact, Path(output_dir), exporting)
    _write_json(file, result.facts)
    if not adapter:
        from qlora_tool.reporting.exported import note_export

        note_export(Path(run_or_adapter), result)
    if on_written is not None:
        on_written(result)
    return replace(result, uploaded=upload(result.folder, push_to_hub)) if push_to_hub else result


def generate(
    run_or_model: AnyPath,
    *,
    prompt: str | Sequence[str] = (),
    prompts: AnyPath | None = None,
    chat: Iterable[str] | Literal[False] = False,
    system: str | None = None,
    adapter: Adapters = (),
    compare_base: bool = False,
    json: AnyPath | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    model: AnyPath | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
    device: str = "auto",
    compute_dtype: str = "auto",
    on_text: Callable[[str], None] | None = None,
    on_answer: Callable[[PromptAnswer], None] | None = None,
) -> GenerateResult:
    """Answer prompts with a run, an adapter, an exported model or any model.

    Args:
        run_or_model: a folder, a hub id, or demo.
        prompt: what to ask: one text or several.
        prompts: a data file, or a .txt with one prompt a line.
        chat: the turns of one conversation, in the place of prompts; each is answered before the next is asked for.
        system: a system turn before each prompt, or before the conversation.
        adapter: adapters on one base, all of which answer: `{"poems": "runs/poems"}`, or `["poems=runs/poems"]`. The
            base is `run_or_model`, or the base of it where it is a run or an adapter, which then answers too.
        compare_base: let the base answer first.
        json: where to write the answers, one JSON object a line.
        max_new_tokens: of an answer at most.
        temperature: 0 is greedy.
        top_p, top_k: what sampling is restricted to; 1.0 and 0 restrict nothing.
        seed: of the sampling.
        batch_size: prompts at a time.
        chat_template_kwargs: what the chat template is given besides; by default what it was in training.
        model, quantization, double_quant: the base of an adapter that does not say it all.
        device: auto, cuda or cpu.
        compute_dtype: of the matrix products: auto, bfloat16, float16 or float32.
        on_text: told an answer of a chat piece by piece, as it is written.
        on_answer: told each answer of a chat before the next turn is asked for.

    Raises:
        UserError: nothing to ask, a prompt that is too long, a model that cannot be opened, an option at fault.
        MachineError: the hub is out of reach.

    Example:
        >>> from qlora_tool import generate
        >>> answered = generate("my-run", prompt="What is the first letter?", max_new_tokens=4)
        >>> len(answered.answers), answered.answers[0].answer.tokens <= 4
        (1, True)
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    file = None if prompts is None else os.fspath(prompts)
    refuse_together(chat is not False, texts, file, adapter, compare_base, system)
    read = Read({"the data of --prompts": file}, _models(run_or_model, model, adapter))
    answers = new_file("--json", json, results.ANSWERS, read)
    from qlora_tool.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, batch_size)
    if file is not None:
        from qlora_tool.data.check import check_sources

        check_sources([file], need_answers=False, run=run_or_model)
    refuse_as_model(os.fspath(run_or_model), rows="--prompts")
    refuse_no_weights(os.fspath(run_or_model))
    refuse_no_weights(None if model is None else os.fspath(model))
    options = _base_options(model, quantization, double_quant, device, compute_dtype)
    with without_collection():
        from qlora_tool.inference.chat import chat as talk
        from qlora_tool.inference.generate import Questions
        from qlora_tool.inference.generate import generate as answer
        from qlora_tool.inference.named import find_named

    named = find_named(run_or_model, options, chat_template_kwargs, adapter)
    if chat is False:
        found = answer(named, Questions(texts, file, system), sampling, compare_base)
    else:
        found = talk(cast("Artifact", named), chat, sampling, system, on_text, on_answer)
    _write_json_lines(answers, [one.as_json() for one in found.answers])
    return found


def evaluate(
    run_or_model: AnyPath,
    data: AnyPath | Sequence[AnyPath] | Mapping[str, AnyPath],
    *,
    format: str = "auto",
    max_length: int | None = None,
    generate: bool = False,
    show: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    adapter: Adapters = (),
    compare_base: bool = False,
    json: AnyPath | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    model: AnyPath | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
    device: str = "auto",
    compute_dtype: str = "auto",
) -> EvaluateResult:
    """Loss, perplexity and exact match of a model on data.

    Args:
        run_or_model: a run's folder, an adapter's, an exported model, any model folder, a hub id, or demo.
        data: what to score: a file; several, each with the file's name or as NAME=FILE; or a mapping from names.
        format: how rows are read, as in `data.format`.
        max_length: tokens of a row at most; None: the run's, else 2048.
        generate: also generate answers, greedily: the share of exact matches, and how like they are (token F1).
        show: how many of them the result's `shown` gives of each set; None: 3. All of them are in its scores.
        max_new_tokens: of an answer at most; None: 256.
        batch_size: rows at a time.
        adapter: adapters on one base, each of which is scored; see `generate`.
        compare_base: score the base alone, too.
        json: where to write the scores.
        chat_template_kwargs: what the chat template is given besides; by default what it was in training.
        model, quantization, double_quant: the base of an adapter that does not say it all.
        device: auto, cuda or cpu.
        compute_dtype: of the matrix products: auto, bfloat16, float16 or float32.

    Raises:
        UserError: data that cannot be read, a model that cannot be opened, an option at fault.
        MachineError: the hub is out of reach.

    Example:
        >>> import math
        >>> from qlora_tool import evaluate
        >>> score = evaluate("my-run", "rows.jsonl").scores["rows"]
        >>> score.loss > 0, round(math.log(score.perplexity) - score.loss, 6)
        (True, 0.0)
    """
    from qlora_tool.inference.sampling import Sampling

    if show is not None and (show < 0 or not generate):
        raise OptionError(f"--show: expected at least 0, found {show}" if show < 0 else
                          "--show is of answers, and none are generated: give --generate too")  # fmt: skip
    if max_new_tokens is not None and not generate:
        raise OptionError("--max-new-tokens is of answers, and none are generated: give --generate too")
    settings = with_values(Config(), {"data.format": format, **({"data.max_length": max_length} if max_length else {})})
    sampling = Sampling(256 if max_new_tokens is None else max_new_tokens, batch_size=batch_size)
    checked_adapters(adapter)
    from qlora_tool.data.check import check_sources, named_sources

    if isinstance(data, Mapping):
        sources = {name: os.fspath(source) for name, source in data.items()}
    else:
        sources = named_sources([data] if isinstance(data, str | os.PathLike) else data)
    if not sources:
        raise OptionError("nothing to score: give --data FILE")
    read = Read({f"the data of --data {source}": source for source in sources.values()},
                _models(run_or_model, model, adapter))  # fmt: skip
    file = new_file("--json", json, results.SCORES, read)
    check_sources(sources.values(), format, run=run_or_model)
    refuse_as_model(os.fspath(run_or_model), rows="--data")
    refuse_no_weights(os.fspath(run_or_model))
    refuse_no_weights(None if model is None else os.fspath(model))
    options = _base_options(model, quantization, double_quant, device, compute_dtype)
    with without_collection():
        from qlora_tool.inference.named import find_named
        from qlora_tool.inference.score import evaluate as score

    found = find_named(run_or_model, options, chat_template_kwargs, adapter, several=compare_base)
    result = score(found, sources, settings.data, max_length=max_length, sampling=sampling if generate else None,
                   batch_size=batch_size, compare_base=compare_base)  # fmt: skip
    _write_json(file, result.as_json())
    return result if show is None else replace(result, show=show)


def inspect(
    run_or_adapter: AnyPath,
    *,
    truncate: int | None = None,
    output_dir: AnyPath | None = None,
    data: AnyPath | None = None,
    overwrite: bool = False,
    all: bool = False,
    json: AnyPath | None = None,
    plot: AnyPath | None = None,
    model: AnyPath | None = None,
    quantization: str | None = None,
    double_quant: bool | None = None,
) -> InspectResult:
    """What an adapter learned: each update against its weight, its singular values, and what they say of the rank.

    Args:
        run_or_adapter: a run's folder, or an adapter's, ours or PEFT's.
        truncate: also write the adapter cut to this rank, into `output_dir`.
        output_dir: where the cut adapter goes; it must not exist.
        data: rows on which it is compared with the whole one; None: the run's evaluation rows.
        overwrite: replace an existing folder.
        all: rows of the table are single modules, not kinds of them.
        json: where to write all of it.
        plot: where to draw it: a .png file.
        model, quantization, double_quant: the base of an adapter that does not say it all.

    Raises:
        UserError: no adapter there, nothing to cut, an option at fault.
        MachineError: the disk, or the hub where the loss of a cut adapter is measured.

    Example:
        >>> from qlora_tool import inspect
        >>> found = inspect("my-run")
        >>> len(found.rows) > 0
        True
    """
    if (truncate is None) != (output_dir is None):
        raise OptionError("--truncate R and --output-dir DIR go together: the cut adapter, and where it is written")
    if data is not None and truncate is None:
        raise OptionError("--data measures a cut adapter: give --truncate R and --output-dir DIR with it")
    if plot is not None and Path(plot).suffix != ".png":
        raise OptionError(f"invalid value for --plot: {os.fspath(plot)}: expected a name that ends in .png")
    rows = None if data is None else os.fspath(data)
    read = Read({"the data of --data": rows},
                {"the folder of --output-dir": output_dir, **_models(run_or_adapter, model)})  # fmt: skip
    file = new_file("--json", json, results.UPDATES, read)
    picture = new_file("--plot", plot, results.UPDATES_PLOT, read.and_file("--json", file))
    if rows is not None:
        from qlora_tool.data.check import check_sources

        check_sources([rows], run=run_or_adapter)
    refuse_as_model(os.fspath(run_or_adapter), adapter=True)
    if truncate is not None and output_dir is not None:
        from qlora_tool.export.place import refuse_taken
        from qlora_tool.inspection.rank import refuse_rank

        refuse_taken(Path(output_dir), overwrite)
        refuse_rank(os.fspath(run_or_adapter), truncate)
    options = _base_options(model, quantization, double_quant,
                            quantization_else="none" if truncate is None else None)  # fmt: skip
    from qlora_tool.artifacts import find_artifact
    from qlora_tool.inspection.inspect import inspect as look

    artifact = find_artifact(os.fspath(run_or_adapter), options)
    result = look(artifact, every_module=all, r=truncate, output=None if output_dir is None else Path(output_dir),
                  data=rows, overwrite=overwrite)  # fmt: skip
    _write_json(file, result.as_json())
    if picture is not None:
        from qlora_tool.inspection.plot import write_png

        write_png(picture, result.inspection)
    return result


def report(run: AnyPath, *, output: AnyPath | None = None) -> ReportResult:
    """Write the page about a run: its losses, memory, rows, ranks, exports and configuration.

    `train` writes one at its end; after an export, say, it is made again by this. It is one file that loads nothing.

    Args:
        run: a run's folder, finished or not.
        output: the file to write; None: `report.html` in the run's folder.

    Raises:
        UserError: no run lies there, or a folder to write into is not there.
        MachineError: the disk refuses.

    Example:
        >>> from qlora_tool import report
        >>> report("my-run").file.name
        'report.html'
    """
    refuse_as_run(os.fspath(run))
    folder = Path(run).expanduser()
    if output is not None and Path(output).expanduser().absolute() == (folder / "report.html").absolute():
        output = None
    file = new_file("--output", output, results.PAGE, Read(parts=_models(run)))
    from qlora_tool.reporting.page import write_report

    return write_report(folder, file)


def _configuration(config: AnyConfig, overrides: Overrides) -> Config:
    """The configuration of a command that was given one; what is likely to be a slip in it is told."""
    found = load_config(config, overrides)
    for doubt in doubts(found):
        logger.warning("%s", doubt)
    return found


def _refuse_no_data(config: AnyConfig, read: Config) -> None:
    """Where a recipe was named whose data are not there, refuse it with what to type."""
    if isinstance(config, str):
        given = {"train": read.data.train, "eval": read.data.eval}
        refuse_no_data(config, {key: source for key, source in given.items() if isinstance(source, str)})


def _with_output_dir(overrides: Overrides, output_dir: AnyPath | None) -> Overrides:
    if output_dir is None:
        return overrides
    if isinstance(overrides, Mapping):
        return {**overrides, "training.output_dir": os.fspath(output_dir)}
    given = [overrides] if isinstance(overrides, str) else overrides
    return [*given, f"training.output_dir={_json.dumps(os.fspath(output_dir))}"]


def _base_options(
    model: AnyPath | None,
    quantization: str | None,
    double_quant: bool | None,
    device: str = "auto",
    compute_dtype: str = "auto",
    quantization_else: str | None = None,
) -> BaseOptions:
    """What a call says of an adapter's base.

    Raises:
        UserError: an option has a value that its key in a configuration could not have.
    """
    given = {"quantization": quantization, "double_quant": double_quant, "device": device,
             "compute_dtype": compute_dtype}  # fmt: skip
    with_values(Config(model=ModelConfig()), {f"model.{k}": value for k, value in given.items() if value is not None})
    from qlora_tool.artifacts import BaseOptions

    base = None if model is None else os.fspath(model)
    return BaseOptions(base, quantization, double_quant, device, compute_dtype, quantization_else)


def _read_by(given: AnyConfig, config: Config) -> Read:
    """What a configuration names, and its own file."""
    from qlora_tool.data.tokenize import evaluation_sources

    named = {"train": config.data.train, **evaluation_sources(config.data)}
    data = {f"the data {source.path}": source.path for value in named.values() for source in sources_of(value)}
    file = given if isinstance(given, str | os.PathLike) else None
    folders = _models(config.model.name_or_path, config.adapter.init_from)
    return Read({"the configuration": file, "data.chat_template": config.data.chat_template, **data},
                {**folders, "the run's folder": config.training.output_dir})  # fmt: skip


def _models(run_or_model: AnyPath, model: AnyPath | None = None, adapters: Adapters = ()) -> dict[str, AnyPath | None]:
    """The folders that a call names."""
    given = adapters.values() if isinstance(adapters, Mapping) else [one.partition("=")[2] or one for one in adapters]
    return {str(one): one for one in (run_or_model, model, *given) if one is not None}


def _write_json_lines(file: Path | None, objects: Sequence[dict[str, Any]]) -> None:
    if file is not None:
        from qlora_tool.files.atomic import write_text

        write_text(file, "".join(f"{_json.dumps(one, ensure_ascii=False)}\n" for one in objects))


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        from qlora_tool.files.atomic import write_json

        write_json(file, content)
