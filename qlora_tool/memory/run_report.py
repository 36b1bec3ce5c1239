"""The memory of a training run: predicted before weights are read, seen in one early step, kept in `memory.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from qlora_tool import __version__
from qlora_tool.errors import UserError
from qlora_tool.files import cache_folder, write_json
from qlora_tool.memory.breakdown import Breakdown, MemoryReport
from qlora_tool.memory.classify import name_optimizer, name_weights, timeline
from qlora_tool.memory.predict import BatchShape, TracerWatch, predict
from qlora_tool.memory.profile import CudaTarget, Prediction
from qlora_tool.memory.trace import Tracer
from qlora_tool.model.open import choose_device, choose_dtype
from qlora_tool.model.source import read_model_config, resolve

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.data.batches import Batch
    from qlora_tool.training.loop import Run
    from qlora_tool.training.step import During

logger = logging.getLogger(__name__)


class RunMemory:
    """A `Watcher` of a run: refuses what will not fit, and writes `memory.json`."""

    def __init__(self):
        self.predicted: Breakdown | None = None

    def check(self, config: Config, batch: Batch) -> None:
        """Predict the run on its largest batch, and hold that against what the device has.

        Raises:
            UserError: on CUDA it will not fit. On a CPU, which may swap, that is a warning.
        """
        device = choose_device(config.model.device)
        shape = shape_of(batch)
        self.predicted = kept_prediction(config, shape, device)
        free = free_bytes(device)
        needed = self.predicted.needed_bytes
        logger.info("memory: %.2f GB predicted at the peak (rows of up to %d tokens); %.2f GB are free on %s",
                    needed / 1e9, shape.length, free / 1e9, device)  # fmt: skip
        if needed > free:
            line = (
                f"this run needs {needed / 1e9:.2f} GB at its peak, and {free / 1e9:.2f} GB are free on {device}; "
                "`qlora-tool profile-memory CONFIG --plan --device-memory SIZE` shows what fits"
            )
            if device.type == "cuda":
                raise UserError(line)
            logger.warning(line)

    @contextmanager
    def watch(self, run: Run) -> Iterator[During]:
        """See one step: on a CPU by the tracer, which slows it down, on CUDA by the allocator's own peak."""
        if run.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield lambda phase: _nothing()
            measured = None
        else:
            logger.info("memory: this step is traced, and so is slower")
            with Tracer() as tracer:
                with tracer.phase("load"):
                    name_weights(tracer, run.model.module, run.adapters)
                with tracer.phase("optimizer"):  # its state came with the step before
                    name_optimizer(tracer, run.optimizer)
                layers = run.model.checkpointed_layers()
                run.model.checkpoint_layers(bool(layers), tracer.recomputation)
                hooks = tracer.follow_modules(run.model.module, layers)
                yield partial(TracerWatch(tracer).during, run.optimizer, run.progress.step + 1)
                for hook in hooks:
                    hook.remove()
                run.model.checkpoint_layers(bool(layers))
            measured = timeline(tracer.trace).breakdown()
        report = MemoryReport(run.model.device.type, run.config.model_dump(mode="json"), self.predicted, measured)
        write_json(run.folder.path / "memory.json", report.to_json())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def shape_of(batch: Batch) -> BatchShape:
    """The shape of a real batch. Packed rows are taken as one long example each, which costs the same."""
    rows, length = batch.input_ids.shape
    segments = None if batch.position_ids is None else _segments(batch)
    return BatchShape(rows, length, batch.trained_tokens, batch.attention_mask is not None, segments)


def _segments(batch: Batch) -> tuple[int, ...]:
    """Lengths of the first row's examples."""
    starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
    return tuple(stop - start for start, stop in pairwise(starts))


def free_bytes(device: torch.device) -> int:
    """What the run may take: free on the card; on a CPU what the system has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def kept_prediction(config: Config, shape: BatchShape, device: torch.device) -> Breakdown:
    """The prediction for a run's largest batch, made once: the same run asks again each time it is resumed."""
    dtype = choose_dtype(config.model.compute_dtype, device)
    folder = resolve(config.model.name_or_path, config.model.revision)
    model_config = read_model_config(folder, config.model.trust_remote_code)
    settings = config.model_dump(mode="json")
    for section, keys in {"data": ("train", "eval"), "training": ("output_dir", "learning_rate", "seed")}.items():
        for key in keys:
            settings[section].pop(key)
    target = CudaTarget.of(None) if device.type == "cuda" else None
    identity = [__version__, torch.__version__, model_config.to_json_string(), settings, dataclasses.astuple(shape),
                str(dtype), target and dataclasses.astuple(target)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / "predictions" / f"{digest}.json"
    try:
        return Breakdown.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # not predicted yet, or not readable
    found = Prediction.of(predict(config, model_config, shape, dtype), target, config.training.optim).breakdown
    write_json(file, found.to_json())
    return found
