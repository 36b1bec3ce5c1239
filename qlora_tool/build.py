"""From a configuration to a model with its adapters on it: the one way, whether its tensors are read, random or fake.

Training, predicting, measuring, evaluating and the export's live side all come here. What differs between them is where
tensors come from, and is passed in. Everything that a run may decide differently from what it was asked is decided in
`resolve`, from the model's configuration alone, before weights or data are read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.adapters.adapter import Adapter
from qlora_tool.adapters.attach import AdapterSet, attach
from qlora_tool.adapters.attach_stored import attach_stored, refuse_not_repeated
from qlora_tool.adapters.calibration import Read, calibrated, is_kept, reads_data
from qlora_tool.adapters.fusion import tile_mlps
from qlora_tool.adapters.initial import initial_settings, refuse_other_places, started_from
from qlora_tool.adapters.lacking import further_targets, started_fresh
from qlora_tool.adapters.peft_names import taken_for_experts
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.starts import WeightStart, start_facts, taken_out
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.adapters.targets import unmatched_patterns
from qlora_tool.adapters.trained_base import train_biases
from qlora_tool.config import Config, ModelConfig, with_values
from qlora_tool.errors import ToolError
from qlora_tool.methods import METHODS
from qlora_tool.model.behaviour import behaviour_of
from qlora_tool.model.by_example import keep_mixers_apart
from qlora_tool.model.cached_base import cached_base, cached_start, write_cached_base
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.devices import choose_device
from qlora_tool.model.exceptions import refuse_unknown_names
from qlora_tool.model.fused_modules import fuse_modules
from qlora_tool.model.load import build_skeleton, frozen_skeleton, load_base, read_unquantized
from qlora_tool.model.open import choose_dtype
from qlora_tool.model.positions import rotate_by_example
from qlora_tool.model.random_source import RandomSource
from qlora_tool.model.resized import rows_in_files
from qlora_tool.model.segments import leave_out_cudnn
from qlora_tool.model.slots import Prepare, Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.ops.declare import target_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from qlora_tool.data.examples import Example
    from qlora_tool.model.checkpointing import Recomputation

logger = logging.getLogger(__name__)


class Tensors(Protocol):
    """Where the tensors of a run come from.

    Attributes:
        folder: the model's; a path to nothing where there is none.
        has_values: whether they are a model's values; else only shapes and dtypes count.
        makes_starts: whether starts that are made of weights or data are made of these; else adapters start as
            `default` does.
    """

    folder: Path
    has_values: bool
    makes_starts: bool

    def base(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None = None,
    ) -> PreTrainedModel:  # fmt: skip
        """The frozen base, quantized, each weight after `prepare`."""
        ...

    def unquantized(self, model_config: Any, device: torch.device) -> Read:
        """What reads the base's weights as they are before they are quantized."""
        ...

    def adapter(self, folder: Path) -> StoredAdapter:
        """The adapter in `folder`, which the run starts from."""
        ...


class FromFiles:
    """Tensors read from the folder of the model that a configuration names, or from its quantized form in the cache.

    Raises:
        UserError, MachineError: see `resolve_model`.
    """

    has_values = makes_starts = True

    def __init__(self, config: ModelConfig):
        self.config = config
        self.folder = resolve_model(config.name_or_path, config.revision)

    def base(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None = None,
    ) -> PreTrainedModel:  # fmt: skip
        config = self.config
        made = prepare if isinstance(prepare, WeightStart) else None
        kept = config.keep_quantized and (prepare is None or made is not None) and rows_in_files(model_config) is None
        start = made.identity if made else ""
        cached = cached_base(self.folder, quantization, compute_dtype, start) if kept else None
        if cached is not None:
            logger.info("quantized base read from the cache: %s", cached.folder)
            if made:
                made.take(cached_start(cached))
        module = load_base(self.folder, model_config, quantization, device, compute_dtype,
                           trust_remote_code=config.trust_remote_code, checkpoint=cached,
                           prepare=None if cached is not None else prepare)  # fmt: skip
        if kept and cached is None:
            written = write_cached_base(module, self.folder, quantization, compute_dtype, start,
                                        made.made() if made else None)  # fmt: skip
            logger.info("quantized base written to the cache for the next run: %s", written)
        return module

    def unquantized(self, model_config: Any, device: torch.device) -> Read:
        return read_unquantized(self.folder, model_config, device, self.config.trust_remote_code)

    def adapter(self, folder: Path) -> StoredAdapter:
        return read_adapter(folder)


class Random:
    """Random tensors, of which only shapes and dtypes count; fake ones under a fake mode.

    Args:
        makes_starts: see `Tensors`: what is asked of memory wants them made, what only asks whether all fits together
            does not.
    """

    folder = Path()
    has_values = False

    def __init__(self, makes_starts: bool = False):
        self.makes_starts = makes_starts

    def base(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None = None,
    ) -> PreTrainedModel:  # fmt: skip
        return load_base(self.folder, copy.deepcopy(model_config), quantization, device, compute_dtype,
                         open_source=RandomSource.of(model_config), prepare=prepare)  # fmt: skip

    def unquantized(self, model_config: Any, device: torch.device) -> Read:
        return read_unquantized(self.folder, copy.deepcopy(model_config), device,
                                open_source=RandomSource.of(model_config))  # fmt: skip

    def adapter(self, folder: Path) -> StoredAdapter:
        with unset_fake_temporarily(), _disable_current_modes():
            stored = read_adapter(folder)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}
        made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        return replace(stored, tensors=made)


@dataclass(frozen=True)
class Built:
    """A model with what is trained on it.

    Attributes:
        remarks: what was asked for and could not be done, or costs more than usual, a line each.
    """

    model: CausalLM
    adapters: AdapterSet
    remarks: list[str]


@dataclass(frozen=True)
class Start:
    """What adapters may start from beside the model's files.

    Attributes:
        examples: of the training data.
        checkpoint: the tensors of the checkpoint that the run goes on from, by their names in it.
    """

    examples: Sequence[Example] = ()
    checkpoint: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Setup:
    """What is known of a run on this machine before weights or data are read.

    Attributes:
        config: resolved.
        model_config: the model's transformers configuration.
        device, compute_dtype: where it runs, and what products run in.
    """

    config: Config
    model_config: Any
    device: torch.device
    compute_dtype: torch.dtype

    @classmethod
    def of(cls, config: Config) -> Setup:
        """Decide all that can be decided.

        Raises:
            UserError, MachineError: no such device or model, what `resolve` refuses, or what `build` does.
        """
        stored = started_from(config.adapter)  # a fault of it is told before a model is fetched
        device = choose_device(config.model.device)
        folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
        model_config = fitting_config(read_model_config(folder, config.model.trust_remote_code), stored,
                                      config.model.trust_remote_code)  # fmt: skip
        decided = resolve(config, model_config, device.type)
        _refuse_misfit(decided, model_config)
        dtype = choose_dtype(config.model.compute_dtype, device)  # last, as `auto` may be measured
        decided = with_values(decided, {"model.compute_dtype": _name(dtype)})
        return cls(decided, model_config, device, dtype)

    @property
    def padding_free(self) -> bool:
        """Whether rows that are not packed are laid one after the other, as asked for and as the family allows."""
        return goes_without_padding(self.config, self.model_config)

    def build(
        self, tensors: Tensors | None = None, recomputation: Recomputation | None = None, start: Start | None = None
    ) -> Built:
        """The model with its adapters; see `build`. Read from the model's files unless `tensors` says otherwise."""
        tensors = tensors or FromFiles(self.config.model)
        return build(self.config, self.model_config, tensors, device=self.device, compute_dtype=self.compute_dtype,
                     recomputation=recomputation, start=start)  # fmt: skip


def _refuse_misfit(config: Config, model_config: Any) -> None:
    """Refuse names that match nothing in the model, and all else that `build` refuses, without any weights.

    Raises:
        UserError: see `build`.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            if config.model.skip_modules and not isinstance(config.model.skip_modules, str):
                refuse_unknown_names("model.skip_modules", config.model.skip_modules, build_skeleton(model_config))
            build(config, model_config, Random(), device=torch.device("cpu"), compute_dtype=torch.float32)
    except ToolError:
        raise
    except Exception as error:  # what an unknown architecture's code raises: it may run on real tensors
        logger.debug("%s cannot be built without weights: %s", model_config.model_type, error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve(
    config: Config, model_config: Any, device_type: str, compute_dtype: torch.dtype | None = None
) -> Config:
    """The configuration as it will be run, so that training it again repeats the run.

    `gradient_checkpointing: auto` stays where it depends on memory: the numbers are the same whatever is recomputed.

    Args:
        model_config: the model's transformers configuration.
        device_type: cuda or cpu.
        compute_dtype: what products run in there; None: as the configuration has it.

    Raises:
        UserError: an adapter to start from that contradicts what was asked for.
    """
    values: dict[str, Any] = {} if compute_dtype is None else {"model.compute_dtype": _name(compute_dtype)}
    chosen_later = config.training.max_memory is not None or device_type == "cuda"  # when the largest batch is known
    if config.training.gradient_checkpointing == "auto" and not chosen_later:
        values["training.gradient_checkpointing"] = recomputes = _recomputes(config, model_config)
        if not recomputes:
            logger.warning("training.gradient_checkpointing: %s has no layers that can be recomputed; what they "
                           "save for backward is kept", model_config.model_type)  # fmt: skip
    if (stored := started_from(config.adapter)) is not None:
        further = further_targets(stored, model_config, config.model.trust_remote_code)
        values |= initial_settings(stored, config.adapter, further)
        values |= _initial_base(stored, config.model)
    if not packs(config, model_config):
        values["data.packing"] = False
    return with_values(config, values)


def packs(config: Config, model_config: Any) -> bool:
    """Whether rows are packed: where that is asked for and the family can. Where it cannot, a warning says so."""
    if config.data.packing and not packs_apart(config, model_config):
        logger.warning("data.packing: in a %s model packed examples would attend to one another; rows are padded "
                       "instead", model_config.model_type)  # fmt: skip
        return False
    return config.data.packing


def _initial_base(stored: StoredAdapter, config: ModelConfig) -> dict[str, Any]:
    """What the base of an adapter to start from had unquantized: what PEFT leaves, where it is PEFT's."""
    provenance = stored.provenance
    found = "as-peft" if provenance is None else provenance.get("skip_modules", [])
    if config.quantization == "none" or found == config.skip_modules:
        return {}
    if "skip_modules" not in config.model_fields_set:
        return {"model.skip_modules": found}
    logger.warning("model.skip_modules: %s, but %s, which adapter.init_from names, was trained on a base with %s: it "
                   "goes on from other answers than it gave", config.skip_modules, stored.folder, found)  # fmt: skip
    return {}


def _recomputes(config: Config, model_config: Any) -> bool:
    return behaviour_of(model_config, config.model.trust_remote_code).recomputes


def packs_apart(config: Config, model_config: Any) -> bool:
    """Whether the model keeps examples apart that lie in one row; attention in chunks of fixed places (llama4) cuts
    them where a row is longer than a chunk."""
    chunk = getattr(model_config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and config.data.max_length > chunk:
        return False
    return behaviour_of(model_config, config.model.trust_remote_code).keeps_apart is not None


def goes_without_padding(config: Config, model_config: Any) -> bool:
    """Whether rows that are not packed are laid one after the other: where that is asked for and attention goes by
    segment. A family that needs masks would get one of all rows by all rows, larger than those of the rows together."""
    by_segment = behaviour_of(model_config, config.model.trust_remote_code).keeps_apart == "segments"
    return config.data.padding_free and by_segment


def _on_places(config: Config, model: CausalLM, adapters: AdapterSet) -> list[str]:
    """What is to be said of where adapters sit."""
    lines = unmatched_patterns(adapters.layers, config.adapter)
    linears = [name for name, layer in adapters.layers.items() if type(layer) is Adapter]
    why = taken_for_experts(linears, model.config.get_text_config().model_type)
    if why and METHODS[config.adapter.method].peft_type == "LORA":
        lines.append(f"adapter.target_modules: {why} for PEFT's users")
    return lines


def build(
    config: Config,
    model_config: Any,
    tensors: Tensors,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    recomputation: Recomputation | None = None,
    around_recomputation: Callable[[], AbstractContextManager[None]] = nullcontext,
    start: Start | None = None,
) -> Built:
    """A model with its adapters, ready to train.

    Args:
        config: resolved.
        model_config: the model's transformers configuration; it stays as it is.
        tensors: where they come from.
        device: where everything lives.
        compute_dtype: what products run in.
        recomputation: what is recomputed in backward; by default what `gradient_checkpointing` says of all layers.
        around_recomputation: a context that is open while something is computed again.
        start: what adapters start from beside the model's files.

    Raises:
        UserError, MachineError: the base cannot be read, or the adapter does not fit it.
    """
    model, adapters, remarks = _with_adapters(config, model_config, tensors, device, compute_dtype, start or Start())
    remarks = [*_on_places(config, model, adapters), *remarks]
    if found := model.beyond_peft:
        remarks.append(
            f"model.quantization: {found}; transformers with bitsandbytes, and so PEFT, leaves them unquantized: this "
            "base differs from PEFT's; model.skip_modules: as-peft makes it the same"
        )
    if not tile_mlps(model.module, config.training.tiled_mlp) and config.training.tiled_mlp:
        remarks.append(
            f"training.tiled_mlp: nothing is tiled, as {model.config.model_type} with {config.adapter.method} has no "
            "gated MLP that runs as one operation (plain LoRA without dropout on all of its modules)"
        )
    remarks += _unlike_others(config, model, adapters)
    if not model.pads_apart:
        remarks.append(
            f"{model.config.model_type}: an example in a padded batch would not give what it gives alone; the rows of "
            "a batch go through the model one by one, which is slower"
        )
    if config.data.packing and not model.by_segment:
        remarks.append(
            f"data.packing: {model.config.model_type} keeps packed examples apart by masks of row by row, for which it "
            "takes more memory and time than families that attend to one segment at a time"
        )
    if not model.projects_plainly:
        remarks.append(
            f"{model.config.model_type} changes its logits before the loss: the loss takes the full logits, "
            "which needs more memory"
        )
    on_card = target_of(torch.empty(0, device=device)).type == "cuda"
    if config.training.offload_boundaries and not on_card:
        remarks.append("training.offload_boundaries: the model is in host memory already; nothing is moved")
    model.offload_boundaries = config.training.offload_boundaries and on_card
    model.checkpoint_layers(recomputation or bool(config.training.gradient_checkpointing), around_recomputation)
    model.module.train()
    return Built(model, adapters, remarks)


def _unlike_others(config: Config, model: CausalLM, adapters: AdapterSet) -> list[str]:
    """Where an adapter is not what one would take it for, a line each."""
    remarks = []
    outputs = (getattr(model.module.get_submodule(name), "o_proj", None) for name in adapters.layers)
    if any(getattr(output, "bias", None) is not None for output in outputs):
        remarks.append(
            f"adapter.method: {config.adapter.method}: o_proj has a bias here, which the prompts add once more, as "
            "under PEFT: training does not begin with what the base gives"
        )
    conv1d = [name for name in adapters.layers if getattr(model.module.get_submodule(name), "transposed", False)]
    if conv1d and not METHODS[config.adapter.method].peft_takes_conv1d:
        remarks.append(
            f"adapter.method: {config.adapter.method}: PEFT cannot load it onto transformers' Conv1D ({conv1d[0]} and "
            f"{len(conv1d) - 1} more here): this adapter is read by qlora-tool alone; export it merged for other tools"
        )
    return remarks


def _with_adapters(
    config: Config, model_config: Any, tensors: Tensors, device: torch.device, compute_dtype: torch.dtype, start: Start
) -> tuple[CausalLM, AdapterSet, list[str]]:
    """The base with adapters on it as training starts or goes on, and what is to be said of their start."""
    if config.adapter.init_from:
        stored = tensors.adapter(Path(config.adapter.init_from))
        prepare = stored.prepare(compute_dtype) if tensors.makes_starts else None
        model = _open_base(config.model, model_config, tensors, device, compute_dtype, prepare)
        model.module.quantized_without = stored.quantized_without
        adapters = attach_stored(model.module, stored, compute_dtype, config.adapter.lora_dropout, config.adapter,
                                 config.training.seed)  # fmt: skip
        # PEFT's file may lack biases that its configuration wants trained.
        adapters.biases |= train_biases(model.module, config.adapter.bias, adapters.layers, compute_dtype)
        refuse_other_places(model.module, adapters, config.adapter, stored)
        return model, adapters, [started_fresh(stored, adapters.fresh)] if adapters.fresh else []
    made = WeightStart.of(
        config.adapter, model_config, Quantization.of(config.model), compute_dtype, config.training.seed,
        config.model.trust_remote_code,
    ) if tensors.makes_starts else None  # fmt: skip
    prepare = taken_out(made, start.checkpoint) if made and start.checkpoint is not None else made
    model = _open_base(config.model, model_config, tensors, device, compute_dtype, prepare)
    known, left = (made.tensors, made.not_reached()) if made else ({}, [])
    if tensors.makes_starts and reads_data(config.adapter) and start.checkpoint is None:
        read = tensors.unquantized(model_config, device)
        known, left = calibrated(model, config, start.examples, read, keep=tensors.has_values)
    elif start.checkpoint is not None:
        left = []  # said when the run began
    adapters = attach(model.module, config.adapter, compute_dtype, config.training.seed, known)
    if (start_facts(config.adapter) or {}).get("taken_out_of_base"):
        model.module.quantized_without = "this run's adapter"
    remarks = [
        f"adapter.init_lora_weights: {getattr(config.adapter, 'init_lora_weights', '')} has nothing to start from in "
        f"{len(left)} of {len(adapters.layers)} modules, such as {left[0]}, which are not quantized or take no part in "
        "a layer; they start as with default"
    ] if left else []  # fmt: skip
    return model, adapters, remarks


def start_is_kept(setup: Setup, examples: Sequence[Example]) -> bool:
    """Whether what a run's adapters start from is kept with the quantized base: it is then read, and not made."""
    config, quantization = setup.config, Quantization.of(setup.config.model)
    if not config.model.keep_quantized:
        return False
    folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
    trusted = config.model.trust_remote_code
    if reads_data(config.adapter):
        _, frozen = frozen_skeleton(setup.model_config, trusted)
        without_weights = CausalLM(frozen, folder, quantization, setup.compute_dtype)
        return is_kept(without_weights, setup.device, config, examples)
    made = WeightStart.of(config.adapter, setup.model_config, quantization, setup.compute_dtype, config.training.seed,
                          trusted)  # fmt: skip
    return made is not None and cached_base(folder, quantization, setup.compute_dtype, made.identity) is not None


def open_model(config: ModelConfig, adapter: StoredAdapter | None = None) -> CausalLM:
    """A model as it answers and is evaluated, with a stored adapter on it where there is one.

    Raises:
        UserError, MachineError: the base cannot be read, or the adapter does not fit it.
    """
    device = choose_device(config.device)
    tensors = FromFiles(config)
    model_config = read_model_config(tensors.folder, config.trust_remote_code)
    model_config = fitting_config(model_config, adapter, config.trust_remote_code)
    prepare = None if adapter is None else adapter.prepare()
    model = _open_base(config, model_config, tensors, device, choose_dtype(config.compute_dtype, device), prepare)
    if adapter is not None:
        refuse_not_repeated(adapter, getattr(prepare, "reached", ()))
        model.module.quantized_without = adapter.quantized_without
        attach_stored(model.module, adapter)
    return model


def _open_base(
    config: ModelConfig, model_config: Any, tensors: Tensors, device: torch.device, compute_dtype: torch.dtype,
    prepare: Prepare | None = None,
) -> CausalLM:  # fmt: skip
    if device.type == "cuda":
        leave_out_cudnn()
    behaviour = behaviour_of(model_config, config.trust_remote_code)
    quantization = Quantization.of(config)
    module = tensors.base(model_config, quantization, device, compute_dtype, prepare)
    keep_mixers_apart(module)
    rotate_by_example(module)
    return CausalLM(
        module, tensors.folder, quantization, compute_dtype,
        projects_plainly=behaviour.projects_plainly, by_segment=behaviour.keeps_apart == "segments",
        pads_apart=behaviour.pads_apart, fused=fuse_modules(module), draws=behaviour.draws,
    )  # fmt: skip
