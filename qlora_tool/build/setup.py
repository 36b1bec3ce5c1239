"""A run before weights or data are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_tool.adapters.calibration import is_kept, reads_data
from qlora_tool.adapters.initial import started_from
from qlora_tool.adapters.resized import fitting_config
from qlora_tool.adapters.starts import WeightStart
from qlora_tool.config import Config, with_values
from qlora_tool.errors import ToolError
from qlora_tool.model.cached_base import cached_base
from qlora_tool.model.causal_lm import CausalLM
from qlora_tool.model.devices import choose_device
from qlora_tool.model.exceptions import refuse_unknown_names
from qlora_tool.model.load import build_skeleton, frozen_skeleton
from qlora_tool.model.open import choose_dtype
from qlora_tool.model.resized import rows_in_files
from qlora_tool.model.slots import Quantization
from qlora_tool.model.source import read_model_config
from qlora_tool.model.source import resolve as resolve_model

if TYPE_CHECKING:

    from qlora_tool.data.examples import Example
    from qlora_tool.model.checkpointing import Recomputation

from qlora_tool.build.build import Built, Start, build
from qlora_tool.build.resolve import goes_without_padding, name_of, resolve
from qlora_tool.build.tensors import FromFiles, Random, Tensors

logger = logging.getLogger(__name__)


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
        folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False, by_key=True)
        model_config = fitting_config(read_model_config(folder, config.model.trust_remote_code), stored,
                                      config.model.trust_remote_code)  # fmt: skip
        decided = resolve(config, model_config, device.type)
        _refuse_misfit(decided, model_config)
        dtype = choose_dtype(config.model.compute_dtype, device)  # last, as `auto` may be measured
        decided = with_values(decided, {"model.compute_dtype": name_of(dtype)})
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
    for mode, device in ((torch.device("meta"), "meta"), (FakeTensorMode(allow_non_fake_inputs=True), "cpu")):
        try:
            with mode:
                if config.model.skip_modules and not isinstance(config.model.skip_modules, str):
                    refuse_unknown_names("model.skip_modules", config.model.skip_modules, build_skeleton(model_config))
                build(config, model_config, Random(), device=torch.device(device), compute_dtype=torch.float32)
            return
        except Exception as error:  # what an unknown architecture's code raises: it may run on real tensors
            if device == "meta":
                continue  # fake tensors show it too, or have no trouble with it, in more time
            if isinstance(error, ToolError):
                raise
            logger.debug("%s cannot be built without weights: %s", model_config.model_type, error)


def can_be_kept(config: Config, model_config: Any) -> bool:
    """Whether the quantized base of a run can be kept on the disk, as `model.weights: disk` needs it: not one of a
    resized vocabulary, nor one that the adapter to start from brings."""
    stored = started_from(config.adapter)
    return rows_in_files(model_config) is None and (stored is None or not stored.brings_base)


def base_is_kept(config: Config, model_config: Any, compute_dtype: torch.dtype) -> bool:
    """Whether it is there already."""
    quantization = Quantization.of(config.model)
    folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
    made = WeightStart.of(config.adapter, model_config, quantization, compute_dtype, config.training.seed,
                          config.model.trust_remote_code)  # fmt: skip
    return cached_base(folder, quantization, compute_dtype, made.identity if made else "") is not None


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
