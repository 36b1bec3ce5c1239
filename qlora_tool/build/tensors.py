"""Where the tensors of a run come from: its model's files, or nowhere."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from qlora_tool.adapters.calibration import Read
from qlora_tool.adapters.peft_reading import read_adapter
from qlora_tool.adapters.starts import WeightStart
from qlora_tool.adapters.stored import StoredAdapter
from qlora_tool.build.placement import on_card as streams_to_card
from qlora_tool.build.placement import queues_of, weights_on
from qlora_tool.config import ModelConfig
from qlora_tool.errors import MachineError, UserError
from qlora_tool.files.atomic import replacing_folder
from qlora_tool.files.cache import lacking_room
from qlora_tool.files.tensors import SINGLE_NAME, Checkpoint
from qlora_tool.model.cached_base import cached_base, cached_start, kept_folder, write_cached_base, write_start
from qlora_tool.model.host_base import HostLayers
from qlora_tool.model.load import Loading, load_base, read_unquantized
from qlora_tool.model.random_source import RandomSource
from qlora_tool.model.resized import rows_in_files
from qlora_tool.model.slots import Prepare, Quantization
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.model.streamed_base import stored_bytes, streamed_handles, unread_handles, write_layer_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel



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
        config, where = self.config, weights_on(self.config, device)
        streamed = where == "disk"
        made = prepare if isinstance(prepare, WeightStart) else None
        can_keep = (prepare is None or made is not None) and rows_in_files(model_config) is None
        if streamed and not can_keep:
            raise UserError("model.weights: disk: this adapter brings a base of its own (a resized vocabulary, or a "
                            "start that changed its weights), which is not kept on the disk; set it to resident")
        kept = can_keep and (config.keep_quantized or streamed)
        start = made.identity if made else ""
        cached = cached_base(self.folder, quantization, compute_dtype, start) if kept else None
        if cached is not None:
            logger.info("quantized base read from the cache: %s", cached.folder)
            if made:
                made.take(cached_start(cached))
        elif streamed:
            cached = self._written_by_layers(model_config, quantization, device, compute_dtype, made)
        streams = None
        if streamed:
            streams = partial(streamed_handles, cached=cached, resident=config.resident_layers,
                              queues=queues_of if streams_to_card(device) else None)  # fmt: skip
        elif where == "host":
            streams = partial(HostLayers, resident=config.resident_layers, queues=queues_of)
        trust = config.trust_remote_code
        module = load_base(self.folder, model_config, quantization, device, compute_dtype,
                           trust_remote_code=trust, checkpoint=cached, prepare=None if cached is not None else prepare,
                           streams=streams)  # fmt: skip
        if kept and cached is None:
            written = write_cached_base(module, self.folder, quantization, compute_dtype, start,
                                        made.made() if made else None)  # fmt: skip
            logger.info("quantized base written to the cache for the next run: %s", written)
        return module

    def _written_by_layers(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        made: WeightStart | None,
    ) -> Checkpoint:  # fmt: skip
        loading = Loading.begin(self.folder, model_config, quantization, device, compute_dtype,
                                trust_remote_code=self.config.trust_remote_code, prepare=made)  # fmt: skip
        if reason := lacking_room(stored_bytes(loading)):
            raise MachineError(f"model.weights: disk: {reason}")
        path = kept_folder(self.folder, quantization, compute_dtype, made.identity if made else "")
        logger.info("quantizing the base to the disk, once: %s", path)
        with replacing_folder(path) as temporary:
            write_layer_by_layer(loading, temporary / SINGLE_NAME)
            write_start(temporary, made.made() if made else None)
        return Checkpoint(path)

    def unquantized(self, model_config: Any, device: torch.device) -> Read:
        return read_unquantized(self.folder, model_config, device, self.config.trust_remote_code)

    def adapter(self, folder: Path) -> StoredAdapter:
        return read_adapter(folder)


class Random:
    """Random tensors, of which only shapes and dtypes count; fake ones under a fake mode.

    Args:
        makes_starts: see `Tensors`: what is asked of memory wants them made, what only asks whether all fits together
            does not.
        weights: where the layers' weights lie; two buffers take the place of those that are streamed. None: all are
            on the device.
    """

    folder = Path()
    has_values = False

    def __init__(self, makes_starts: bool = False, weights: ModelConfig | None = None):
        self.makes_starts, self.weights = makes_starts, weights

    def base(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None = None,
    ) -> PreTrainedModel:  # fmt: skip
        streams = None
        if self.weights is not None and (where := weights_on(self.weights, device)) != "resident":
            streams = partial(unread_handles, where=where, resident=self.weights.resident_layers)
        return load_base(self.folder, copy.deepcopy(model_config), quantization, device, compute_dtype,
                         open_source=RandomSource.of(model_config), prepare=prepare, streams=streams)  # fmt: skip

    def unquantized(self, model_config: Any, device: torch.device) -> Read:
        return read_unquantized(self.folder, copy.deepcopy(model_config), device,
                                open_source=RandomSource.of(model_config))  # fmt: skip

    def adapter(self, folder: Path) -> StoredAdapter:
        with unset_fake_temporarily(), _disable_current_modes():
            stored = read_adapter(folder)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}
        made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        return replace(stored, tensors=made)
