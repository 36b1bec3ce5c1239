"""Several processes of one run: that they agree, what each of them holds, and what a run goes on from."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool._version import __version__
from qlora_tool.config import differences, with_values
from qlora_tool.errors import UserError
from qlora_tool.files.hashes import file_hashes
from qlora_tool.model.sharding import held_bytes, shard
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.run_folder import RunFolder, is_checkpoint
from qlora_tool.sizes import counted
from qlora_tool.training.checkpoints import Checkpoint
from qlora_tool.training.going_on import PASSES, checkpoint_at, checkpoint_to_resume
from qlora_tool.training.resume import newest_whole

if TYPE_CHECKING:
    from qlora_tool.adapters.attach import AdapterSet
    from qlora_tool.build.setup import Setup
    from qlora_tool.config import Config
    from qlora_tool.data.tokenize import Dataset
    from qlora_tool.model.causal_lm import CausalLM
    from qlora_tool.training.run_data import RunData
    from qlora_tool.world import World

logger = logging.getLogger(__name__)

# Where things lie may differ from machine to machine; what they hold is compared.
_PLACES = ("training.output_dir", "model.name_or_path", "data.train", "data.eval", "data.chat_template",
           "adapter.init_from")  # fmt: skip


def refuse_disagreement(world: World, setup: Setup, data: RunData) -> None:
    """Compare what the processes are to train, and on what.

    Raises:
        UserError: naming the process and what differs from the first one's.
    """
    if world.size == 1:
        return
    found = world.gather((setup.config, _facts(setup, data)))
    config, facts = found[0]
    for rank, (other, others) in enumerate(found):
        lines = [f"{key}: {theirs!r}, and {ours!r} in process 0"
                 for key, (ours, theirs) in differences(config, other).items() if key not in _PLACES]  # fmt: skip
        lines += [f"{what}: {others[what]}, and {facts[what]} in process 0"
                  for what in facts if others[what] != facts[what]]  # fmt: skip
        if lines:
            failure = UserError(f"process {rank} of {world.size} is to train something else ({'; '.join(lines[:3])}); "
                                "give all processes the same configuration, data and model")  # fmt: skip
            failure.known_to_all = True
            failure.told_elsewhere = not world.is_main
            raise failure


def _facts(setup: Setup, data: RunData) -> Mapping[str, str]:
    config = setup.config
    folder = resolve_model(config.model.name_or_path, config.model.revision)
    return {
        "the base's files": _digest(*sorted(file_hashes(folder).items())),
        "the training data": _of_data(data.train),
        "the evaluation data": _digest(*((name, _of_data(found)) for name, found in data.evaluations.items())),
        "qlora-tool": __version__,
        "PyTorch": torch.__version__.split("+")[0],
    }


def _of_data(dataset: Dataset) -> str:
    """Of the lengths of all examples and the tokens of some."""
    count = len(dataset.examples)
    some = (dataset.examples[number] for number in range(0, count, max(1, count // 256)))
    return _digest(list(dataset.lengths), *((list(one.input_ids), list(one.labels)) for one in some))


def _digest(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def share_out(model: CausalLM, adapters: AdapterSet, config: Config, world: World) -> None:
    """Make several processes start as one: with the first one's adapters, and the base shared out where that is asked
    for.

    Raises:
        UserError: see `shard`.
    """
    machines = len(set(world.gather(platform.node())))
    logger.info("processes: %d on %s, %d micro-batches a step", world.size, counted(machines, "machine"),
                config.training.gradient_accumulation_steps * world.size)  # fmt: skip
    for parameter in adapters.parameters():
        world.copy_from_first(parameter.data)
    if config.training.sharding == "fsdp":
        before = held_bytes(model.module)
        shard(model, adapters.parameters())
        logger.info("processes: this one holds %.3f of the base's %.3f MB between steps",
                    held_bytes(model.module) / 1e6, before / 1e6)  # fmt: skip


def resumed(
    folder: RunFolder, config: Config, resume: str, overwrite: bool, extend: bool, processes: int,
    allow_changes: bool = False,
) -> Checkpoint | None:  # fmt: skip
    """What a run goes on from; None: from the start. See `checkpoint_to_resume`.

    Raises:
        UserError: as there; or another number of processes would make another global batch of the same configuration;
            or a checkpoint is broken, and no earlier one of its run is whole.
    """
    newest, here = None, folder
    if resume not in ("auto", "never"):
        checkpoint_at(Path(resume))  # there has to be one
        here = RunFolder(Path(resume))
        newest = Checkpoint.read(here.path) if is_checkpoint(here.path) else newest_whole(here)
    elif folder.holds_run() and not overwrite and resume == "auto" and (extend or not folder.is_finished()):
        newest = newest_whole(folder)
    if newest is not None:
        config = as_it_was(config, newest, processes)
    chosen = checkpoint_to_resume(folder, config, resume, overwrite, extend, allow_changes)
    return None if chosen is None else newest


def as_it_was(config: Config, checkpoint: Checkpoint, processes: int) -> Config:
    """A configuration with the accumulation that a checkpoint's run had, where that came to the same global batch with
    another number of processes.

    Raises:
        UserError: it came to another one.
    """
    run, passes = RunFolder(checkpoint.path.absolute().parent.parent), checkpoint.progress.global_passes
    if passes is None or not run.holds_run():
        return config
    there = run.config().training.gradient_accumulation_steps
    here = config.training.gradient_accumulation_steps
    if passes == there * processes:  # as many processes as it had
        return config
    if passes != here * processes:
        cure = f"set {PASSES}: {passes // processes}" if passes % processes == 0 else \
            f"start a number of processes that {passes} can be divided by"  # fmt: skip
        raise UserError(f"{checkpoint.path}: its steps have {passes} micro-batches, of {passes // there} "
                        f"process{'' if passes == there else 'es'}, and {processes} with {PASSES}: {here} would make "
                        f"{here * processes}; {cure}")  # fmt: skip
    return with_values(config, {PASSES: there})
