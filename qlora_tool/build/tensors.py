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
from qlora_tool.files.cache import lacking_room, telling_unwritable
from qlora_tool.files.lock import locked_in_turn
from qlora_tool.files.tensors import SINGLE_NAME
from qlora_tool.model.cached_base import cached_base, cached_start, kept_folder, write_cached_base, write_start
from qlora_tool.model.host_base import HostLayers
from qlora_tool.model.kept_hashes import DamagedBase, KeptBase
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
        made = prepare if isinstance(prepare, WeightStart) else None
        can_keep = (prepare is None or made is not None) and rows_in_files(model_config) is None
        if where == "disk" and not can_keep:
            raise UserError("model.weights: disk: this adapter brings a base of its own (a resized vocabulary, or a "
                            "start that changed its weights), which is not kept on the disk; set it to resident")
        given = model_config, quantization, device, compute_dtype, prepare
        if not (can_keep and (config.keep_quantized or where == "disk")):
            return self._loaded(*given)
        path = kept_folder(self.folder, quantization, compute_dtype, made.identity if made else "")
        if (path / SINGLE_NAME).exists():
            try:
                if (module := self._from_kept(*given, made)) is not None:
                    return module
            except DamagedBase as error:
                logger.warning(str(error).replace("the same command makes", "this run makes"))
        waiting = f"{path}: another process is making this quantized base; waiting for it"
        with locked_in_turn(path.with_name(f".{path.name}.lock"), waiting):
            module = self._from_kept(*given, made) if (path / SINGLE_NAME).exists() else None
            return module if module is not None else self._kept_anew(*given, made)

    def _loaded(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None, cached: KeptBase | None = None,
    ) -> PreTrainedModel:  # fmt: skip
        """The base, read from its folder or from its kept form."""
        config, where, streams = self.config, weights_on(self.config, device), None
        if where == "disk":
            streams = partial(streamed_handles, cached=cached, resident=config.resident_layers,
                              queues=queues_of if streams_to_card(device) else None)  # fmt: skip
        elif where == "host":
            streams = partial(HostLayers, resident=config.resident_layers, queues=queues_of)
        return load_base(self.folder, model_config, quantization, device, compute_dtype,
                         trust_remote_code=config.trust_remote_code, checkpoint=cached,
                         prepare=None if cached is not None else prepare, streams=streams)  # fmt: skip

    def _from_kept(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None, made: WeightStart | None,
    ) -> PreTrainedModel | None:  # fmt: skip
        """The base from its kept form; None where that is not to be used.

        Raises:
            DamagedBase: it is not as it was written.
        """
        cached = cached_base(self.folder, quantization, compute_dtype, made.identity if made else "")
        if cached is None:
            return None
        logger.info("quantized base read from the cache: %s", cached.folder)
        if made:
            made.take(cached_start(cached))
        return self._loaded(model_config, quantization, device, compute_dtype, prepare, cached)

    def _kept_anew(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        prepare: Prepare | None, made: WeightStart | None,
    ) -> PreTrainedModel:  # fmt: skip
        """The base, its kept form made of it."""
        if weights_on(self.config, device) == "disk":
            cached = self._written_by_layers(model_config, quantization, device, compute_dtype, made)
            return self._loaded(model_config, quantization, device, compute_dtype, prepare, cached)
        module = self._loaded(model_config, quantization, device, compute_dtype, prepare)
        with telling_unwritable():
            written = write_cached_base(module, self.folder, quantization, compute_dtype, made.identity if made else "",
                                        made.made() if made else None)  # fmt: skip
            logger.info("quantized base written to the cache for the next run: %s", written)
        return module

    def _written_by_layers(
        self, model_config: Any, quantization: Quantization, device: torch.device, compute_dtype: torch.dtype,
        made: WeightStart | None,
    ) -> KeptBase:  # fmt: skip
        loading = Loading.begin(self.folder, model_config, quantization, device, compute_dtype,
                                trust_remote_code=self.config.trust_remote_code, prepare=made)  # fmt: skip
        if reason := lacking_room(stored_bytes(loading)):
            raise MachineError(f"model.weights: disk: {reason}")
        path = kept_folder(self.folder, quantization, compute_dtype, made.identity if made else "")
        logger.info("quantizing the base to the disk, once: %s", path)
        with replacing_folder(path) as temporary:
            write_layer_by_layer(loading, temporary / SINGLE_NAME,
                                 lambda: write_start(temporary, made.made() if made else None))  # fmt: skip
        return KeptBase(path)

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
