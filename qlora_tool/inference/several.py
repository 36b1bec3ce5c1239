"""Several adapters on one base: which there are, whether they are for it, and the model that switches between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tool.adapters.stack import Weighted, base_of_its_own
from qlora_tool.adapters.switch import Switch
from qlora_tool.artifacts import Artifact, BaseOptions, base_folder, changed_base, find_artifact
from qlora_tool.build.open import open_model
from qlora_tool.errors import OptionError, UserError, did_you_mean_path
from qlora_tool.inference.ends import answer_ends, generation_settings
from qlora_tool.inference.open import tokenizer_folder
from qlora_tool.model.open import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_tool.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)

BASE = "base"  # the name by which the base answers beside its adapters
_KEYS = ("quantization", "double_quant", "embeddings", "skip_modules")  # of the base, in which adapters must agree


@dataclass(frozen=True)
class Given:
    """An adapter as an option names it: NAME=FOLDER, or NAME=FOLDER:WEIGHT."""

    name: str
    folder: str
    weight: float | None = None


@dataclass(frozen=True)
class Several:
    """A base and the adapters for it.

    Attributes:
        base: the model that they were trained on, quantized as it was then.
        adapters: by name.
        weights: of the adapters in a sum, by name.
    """

    base: Artifact
    adapters: Mapping[str, Artifact]
    weights: Mapping[str, float]

    def summed(self) -> Artifact:
        """The base with the weighted sum of the adapters on it, the first of which says how rows are read."""
        first = next(iter(self.adapters.values()))
        stack = tuple(Weighted(name, one.adapter, self.weights[name]) for name, one in self.adapters.items())
        if len(stack) == 1 and stack[0].weight == 1:
            return first
        return replace(first, name=" + ".join(one.name for one in self.adapters.values()), stack=stack)


def parse_adapters(given: Sequence[str]) -> list[Given]:
    """What `--adapter` was given; a folder whose own name ends in a colon and a number is that folder.

    Raises:
        OptionError: not NAME=FOLDER, two of one name, or a weight that is no number or 0.
    """
    found: list[Given] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise OptionError(f"--adapter {text}: expected NAME=FOLDER")
        if name in (one.name for one in found):
            raise OptionError(f"--adapter: two adapters are called {name!r}; name them apart")
        if name == BASE:
            raise OptionError(f"--adapter {text}: {BASE!r} is the name of the model without an adapter; choose another")
        path, colon, number = folder.rpartition(":")
        weight = _number(number) if colon and not Path(folder).exists() else None
        if weight is not None and (not math.isfinite(weight) or weight == 0):
            raise OptionError(f"--adapter {text}: expected a weight that is a finite number and not 0, found {number}")
        found.append(Given(name, folder if weight is None else path, weight))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def find_several(name: str, given: Sequence[str], options: BaseOptions, *, weighted: bool = False) -> Several:
    """The adapters that `--adapter` names, and the run or adapter `name` before them where it is one; else it is their
    base.

    Args:
        options: override what the adapters say of their base.
        weighted: whether adapters may have weights; 1 for those without.

    Raises:
        UserError: an adapter that cannot be read, or one for another base, a line each.
    """
    parsed = parse_adapters(given)
    if not weighted and (heavy := next((one for one in parsed if one.weight is not None), None)):
        raise OptionError(
            f"--adapter {heavy.name}={heavy.folder}:{heavy.weight:g}: adapters answer one at a time here, without "
            "weights; export-merged adds them up"
        )
    first = find_artifact(name, options)
    found: dict[str, Artifact] = {}
    weights = {one.name: 1.0 if one.weight is None else one.weight for one in parsed}
    if first.adapter is not None:
        own = _own_name(name)
        if own in weights:
            raise OptionError(f"--adapter: two adapters are called {own!r}, {name} and another; name them apart")
        found[own], weights = first, {own: 1.0, **weights}
        base_name = first.model.name_or_path
    else:
        base_name = _base_name(name, options)
    found |= {one.name: _adapter(one, replace(options, model=base_name), options.model is not None) for one in parsed}
    if not found:
        raise OptionError(f"--compare-base: {name} is a model without an adapter; name a run or an adapter, or give "
                          "--adapter NAME=FOLDER")  # fmt: skip
    _refuse_different(found)
    if own := [fault for name, one in found.items() if (fault := base_of_its_own(name, one.adapter))]:
        raise UserError(own)
    one = next(iter(found.values()))
    # Asked as the first adapter is, so that the two can be compared.
    base = Artifact(base_name, one.model, None, one.run, one.model, chat_template_kwargs=one.chat_template_kwargs)
    _refuse_other_bases(found, base_folder(base))
    return Several(base, found, weights)


def _own_name(name: str) -> str:
    """What a run or an adapter is called: its folder's name, a run's for the adapter inside."""
    path = Path(name).resolve()
    return path.parent.name if path.name == "adapter" else path.name


def _base_name(name: str, options: BaseOptions) -> str:
    if options.model is not None and options.model != name:
        raise OptionError(f"--model {options.model}: the base is {name} already; name one of the two")
    return name


def _adapter(given: Given, options: BaseOptions, base_named: bool) -> Artifact:
    path = Path(given.folder).expanduser()
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        missing = "a file" if path.exists() else f"no such folder{did_you_mean_path(Path(given.folder), siblings)}"
        missing = "a base, not an adapter" if given.folder == "demo" else missing
        raise UserError(
            f"--adapter {given.name}={given.folder}: {missing}; expected a "
            "run's folder or an adapter's"
        )
    artifact = find_artifact(given.folder, options)
    if artifact.adapter is None:
        raise UserError(
            f"--adapter {given.name}={given.folder}: a model without an adapter; expected a run's folder or an "
            "adapter's"
        )
    return replace(artifact, base_named=base_named)


def _refuse_different(found: Mapping[str, Artifact]) -> None:
    """Refuse adapters that were trained on differently quantized bases: no model is both."""
    (first, reference), *others = ((name, artifact.model) for name, artifact in found.items())
    faults = []
    for name, model in others:
        for key in _KEYS:
            values = getattr(reference, key), getattr(model, key)
            unread = key == "double_quant" and reference.quantization in ("none", "int8")
            if values[0] != values[1] and not unread:
                faults.append(
                    f"{found[name].name}: trained on a base with {key} {values[1]}, and {first} ({found[first].name}) "
                    f"with {values[0]}: one base cannot be both; use them one by one"
                )
                break
    if faults:
        raise UserError(faults)


def _refuse_other_bases(found: Mapping[str, Artifact], folder: Path) -> None:
    """Refuse adapters that were trained on other weights, as far as hashes or names tell; a line each. Where `--model`
    names the base, it is only said."""
    faults = []
    for artifact in found.values():
        fault = changed_base(artifact, folder) or _other_name(artifact, folder)
        if fault and artifact.base_named:
            logger.warning("%s; put on it all the same, as --model names it", fault)
        elif fault:
            faults.append(f"{fault}; name the base that it was trained on, or give --model to put it on this one all "
                          "the same")  # fmt: skip
    if faults:
        raise UserError(faults)


def _other_name(artifact: Artifact, folder: Path) -> str | None:
    """What is at odds where names are all that is known: PEFT's files have no hashes."""
    stored, name = artifact.adapter, artifact.model.name_or_path
    if stored is None or stored.base is None or ((stored.provenance or {}).get("base") or {}).get("files"):
        return None
    same = stored.base == name or _last(stored.base) in (_last(name), _last(str(folder)))
    if same or Path(stored.base).expanduser().resolve() == folder.resolve():
        return None
    return f"{artifact.name}: its adapter_config.json names {stored.base} as its base, not {name}"


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


class Opened:
    """The model with all adapters on it, one of them active, and of each the tokenizer and the tokens
    that end its answers.

    Everything of the base is read here: a switch opens none of its files.

    Raises:
        UserError: an adapter that does not fit the base, a line each.
    """

    def __init__(self, several: Several):
        self.several = several
        self.model: CausalLM = open_model(several.base.model)
        self.model.module.eval()
        self._switch = Switch(self.model.module)
        faults = []
        for name, artifact in several.adapters.items():
            try:
                self._switch.add(name, artifact.adapter)
            except UserError as error:
                faults.append(f"{error.lines[0]}; it is not for the base {several.base.name}")
        if faults:
            raise UserError(faults)
        folder, trust = self.model.folder, several.base.model.trust_remote_code
        folders = {name: tokenizer_folder(folder, artifact.adapter) for name, artifact in several.adapters.items()}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {
            name: open_tokenizer(own, trust) for name, own in {BASE: folder, **folders}.items()
        }
        self.ends = {name: answer_ends(generation_settings(folder), self.model.config, tokenizer)
                     for name, tokenizer in self.tokenizers.items()}  # fmt: skip

    def artifact(self, name: str) -> Artifact:
        """What answers under a name."""
        return self.several.base if name == BASE else self.several.adapters[name]

    def use(self, name: str) -> tuple[CausalLM, PreTrainedTokenizerBase]:
        """The model with this adapter active, or the base alone (`BASE`), and its tokenizer."""
        self._switch.use(None if name == BASE else name)
        return self.model, self.tokenizers[name]
