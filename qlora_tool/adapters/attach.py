"""Put adapters on a model, and gather what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_tool.adapters.adapter import Adapter, ExpertsAdapter, generator_for, placed
from qlora_tool.adapters.expert_names import names_in_file
from qlora_tool.adapters.fusion import fuse
from qlora_tool.adapters.places import adaptable, find_places
from qlora_tool.adapters.targets import own_keys, settings_for
from qlora_tool.adapters.token_rows import KEY as TOKENS_KEY
from qlora_tool.adapters.token_rows import SUFFIX, TokenRows, put_rows_on, refuse_rows, wanted_tokens
from qlora_tool.adapters.trained_base import train_all, train_biases, train_modules, transposed_names
from qlora_tool.errors import UserError
from qlora_tool.methods import METHODS
from qlora_tool.methods.method import Settings
from qlora_tool.sizes import counted, noun_of
from qlora_tool.weights.modules import Adaptable

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

# What one of them is called, by what several are.
_ONE = {"linear modules": "linear module", "embeddings": "embedding table", "weights of experts": "weight of experts",
        "projections in part": "projection in part", "tensors in full": "tensor in full",
        "biases": "bias"}  # fmt: skip


@dataclass
class AdapterSet:
    """All that is trained on one model.

    Attributes:
        layers: the adapters by the name of their module, or of their parameter where that is a weight of experts.
        saved: tensors that are fully trained (`modules_to_save`), by parameter name.
        biases: biases that are trained, by parameter name; under `bias: lora_only` those of adapted modules.
        token_rows: rows of embeddings that are trained, by the name of the module.
        transposed: those of `saved` that the model's own module keeps as (in, out) (transformers' Conv1D).
        fresh: those of `layers` that the adapter to start from has nothing for.
    """

    layers: dict[str, Adapter] = field(default_factory=dict)
    saved: dict[str, nn.Parameter] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile the model computes as if nothing were trained: a reference that takes no memory.

        Raises:
            UserError: tensors of the base itself are trained, so that the untrained ones are gone; or the base was
                quantized without what the adapters took over.
        """
        if getattr(model, "quantized_without", None) is not None:
            raise UserError(
                "adapter.init_lora_weights: the base was quantized without what the adapters took over, so there is no "
                "untrained model to compare with; set it to default"
            )
        if self.saved or self.biases:
            raise UserError(
                "adapter.modules_to_save, adapter.bias: the base's own tensors are trained, so there is no untrained "
                "model to compare with; leave both out"
            )
        adapted = [module for module in model.modules() if isinstance(module, Adaptable) and module.active_adapters]
        active = [one.active_adapters for one in adapted]
        for one in adapted:
            one.set_adapters([])
        try:
            yield
        finally:
            for one, names in zip(adapted, active, strict=True):
                one.set_adapters(names)

    @property
    def places(self) -> str:
        """What is trained, in words: `210 linear modules, 2 weights of experts`."""
        kinds = Counter(layer.place for layer in self.layers.values())
        whole = sum(tensor.requires_grad for tensor in self.saved.values())  # others go along with what is saved
        kinds |= Counter({"tensors in full": whole, "biases": len(self.biases)})
        counts = [counted(count, _ONE.get(kind, kind), kind) for kind, count in kinds.items() if count]
        rows = sum(len(rows.tokens) for rows in self.token_rows.values())
        return ", ".join([*counts, *([f"rows of {counted(rows, 'token')}"] if rows else [])])

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter once, in a fixed order."""
        found = [parameter for layer in self.layers.values() for parameter in layer.parameters()]
        found += [tensor for tensor in [*self.saved.values(), *self.biases.values()] if tensor.requires_grad]
        found += [rows.rows_of_tokens for rows in self.token_rows.values()]
        return list(dict.fromkeys(found))

    def rates(self) -> dict[float, list[nn.Parameter]]:
        """What is trained by its learning rate over the configured one, 1 first."""
        own = {id(getattr(layer, name)): rate for layer in self.layers.values()
               for name, rate in layer.rates().items() if hasattr(layer, name)}  # fmt: skip
        found: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in self.parameters():
            found.setdefault(own.get(id(parameter), 1.0), []).append(parameter)
        return {rate: parameters for rate, parameters in found.items() if parameters}

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by its name in a checkpoint: that of PEFT's file without the prefix, in the file's
        orientation, where PEFT has it."""
        return self._named({name: layer.trained() for name, layer in self.layers.items()})

    def peft_tensors(self) -> dict[str, Tensor]:
        """What is saved in PEFT's file, by its names without the prefix, in its orientation."""
        names = names_in_file({name: isinstance(layer, ExpertsAdapter) for name, layer in self.layers.items()})
        forms = {name: layer.peft_form() for name, layer in self.layers.items()}
        return self._named({
            names[name]: {self.layers[name].names(form.method)[key]: tensor for key, tensor in form.tensors.items()}
            for name, form in forms.items()
        })  # fmt: skip

    def peft_shared(self) -> dict[str, Tensor]:
        """What the adapters have in common and PEFT's file holds, by its full names there."""
        return {full: layer.tensors[name] for layer in list(self.layers.values())[:1]
                for name, full in layer.method.saved_shared(layer.settings).items()}  # fmt: skip

    def _named(self, adapted: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {
            f"{name}.{suffix}": tensor for name, tensors in adapted.items() for suffix, tensor in tensors.items()
        }
        found |= {name: tensor.T if name in self.transposed else tensor for name, tensor in self.saved.items()}
        found |= {f"{name}.{SUFFIX}": rows.rows_of_tokens for name, rows in self.token_rows.items()}
        for name, bias in self.biases.items():
            owner = name.removesuffix(".bias")
            found[f"{owner}.base_layer.bias" if owner in self.layers else name] = bias
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy values into the trained tensors.

        Raises:
            UserError: names or shapes that do not fit, all of them in one report.
        """
        own = self.tensors()
        faults = [f"{source}: tensor {name} is missing" for name in own if name not in tensors]
        faults += [f"{source}: tensor {name} fits nothing in the adapter" for name in tensors if name not in own]
        faults += [
            f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if faults:
            rest = len(faults) - 10
            words = noun_of(rest, "more tensor that does not fit", "more tensors that do not fit")
            raise UserError(faults[:10] + ([f"{source}: and {rest} {words}"] if rest > 0 else []))
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def attach(
    model: nn.Module, config: AdapterConfig, compute_dtype: torch.dtype, seed: int,
    known: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> AdapterSet:  # fmt: skip
    """Put fresh adapters on the modules that the configuration names.

    Args:
        model: a transformers model read by `load_base`.
        config: the adapter's section.
        compute_dtype: the dtype of matrix products and of the adapters: bf16 on most devices.
        seed: of the adapters' starts.
        known: by module, tensors of starts that are made of weights or data.

    Raises:
        UserError: names that match nothing.
    """
    method, known = METHODS[config.method], known or {}
    if method.keys.trains_base:
        whole = train_all(model, compute_dtype)
        return AdapterSet(saved=whole, transposed=transposed_names(model, whole))
    places = find_places(model, config)
    usual = Settings(config.r, config.lora_alpha, config.lora_dropout, own_keys(config))
    start = getattr(config, "init_lora_weights", "default")
    if start not in ("default", "gaussian"):
        for name, place in places.items():
            if place.adapter_class is not Adapter:
                what = "experts" if place.parameter else "a part" if place.parts else "embeddings"
                raise UserError(f"adapter.init_lora_weights: {start} is a start of linear modules, but {name} is of "
                                f"{what}; leave those out, or set default or gaussian")  # fmt: skip
    made = method.shared({(place.weight.shape[-2], place.weight.shape[-1]) for place in places.values()}, usual)
    shared = placed(method, made, next(model.parameters()).device, compute_dtype)
    layers = {
        name: place.adapter_class.start(method, place, settings_for(name, config), compute_dtype,
                                        generator_for(seed, name), shared, known.get(name))
        for name, place in places.items()
    }  # fmt: skip
    put_on(model, layers)
    saved = train_modules(model, config.modules_to_save, compute_dtype)
    biases = train_biases(model, config.bias, layers, compute_dtype)
    tokens = wanted_tokens(model, config)
    otherwise = {*layers, *(name.removesuffix(".weight") for name in saved)}
    refuse_rows(model, tokens, otherwise, TOKENS_KEY, "leave one of the two out, or name the embeddings alone")
    token_rows = put_rows_on(model, tokens, compute_dtype)
    return AdapterSet(layers, saved, biases, transposed_names(model, saved), token_rows)


def put_on(model: nn.Module, layers: Mapping[str, Adapter]) -> None:
    """Let what each adapter is for compute with it."""
    for name, layer in layers.items():
        adaptable(model, name).add_adapter("default", layer.train(model.training))
    fuse(model)
