"""Rows of embeddings that are trained, those of chosen tokens, while all others stay frozen (PEFT's
`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qlora_tool.adapters.places import adaptable
from qlora_tool.adapters.targets import matches
from qlora_tool.errors import UserError, did_you_mean
from qlora_tool.model.parameter_source import tied_names
from qlora_tool.weights.modules import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from qlora_tool.config import AdapterConfig

SUFFIX = "token_adapter.trainable_tokens_delta"  # PEFT's name for the rows themselves, no difference
KEY = "adapter.trainable_token_indices"


class TokenRows(nn.Module):
    """The rows (tokens, dim) of some tokens, in the place of those that embeddings, or an output projection, have.

    Args:
        tokens: ids, as many as rows, no two alike.
        rows: what they start from.
    """

    def __init__(self, tokens: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.rows_of_tokens = nn.Parameter(rows)
        ordered, place = torch.tensor(list(tokens), device=rows.device).sort()
        self.register_buffer("ordered", ordered, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def rows(self, index: Tensor, looked_up: Tensor, weight: object = None) -> Tensor:
        """`looked_up` (*index.shape, dim), with the trained rows where `index` names their tokens."""
        ordered, place = cast(Tensor, self.ordered), cast(Tensor, self.place)
        at = torch.searchsorted(ordered, index).clamp_(max=len(ordered) - 1)
        trained = nn.functional.embedding(place[at], self.rows_of_tokens.to(looked_up.dtype))
        return torch.where((ordered[at] == index).unsqueeze(-1), trained, looked_up)

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (…, in) → (…, out) of an output projection, bias included, the tokens' logits by the trained rows."""
        ordered, place = cast(Tensor, self.ordered), cast(Tensor, self.place)
        logits = nn.functional.linear(x, self.rows_of_tokens.to(x.dtype)[place])
        return linear.with_bias(linear.product(x).index_copy(-1, ordered, logits))

    def delta(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight` (vocabulary, dim), fp32."""
        tokens, delta = self.tokens, torch.zeros_like(weight)
        delta[tokens] = self.rows_of_tokens.detach().float() - weight[tokens]
        return delta

    @property
    def tokens(self) -> list[int]:
        """The ids, in the order of the rows."""
        ordered, place = cast(Tensor, self.ordered), cast(Tensor, self.place)
        found: list[int] = ordered[place.argsort()].tolist()
        return found


class ChangedRows(TokenRows):
    """What is added to the rows of some tokens, beside other adapters that add.

    Args:
        tokens: ids, no two alike.
        rows: what is added to each, (tokens, dim).
        vocabulary: how many rows there are.
    """

    def __init__(self, tokens: Sequence[int], rows: Tensor, vocabulary: int) -> None:
        super().__init__(tokens, rows)
        self.vocabulary = vocabulary

    def rows(self, index: Tensor, looked_up: Tensor, weight: object = None) -> Tensor:
        """`looked_up`, with what is added where `index` names their tokens."""
        return looked_up + super().rows(index, torch.zeros_like(looked_up))

    def branch(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out): what it adds to the product of an output projection."""
        ordered, place = cast(Tensor, self.ordered), cast(Tensor, self.place)
        logits = nn.functional.linear(x, self.rows_of_tokens.to(x.dtype)[place])
        return x.new_zeros(*x.shape[:-1], self.vocabulary).index_copy(-1, ordered, logits)

    def forward(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        return linear.with_bias(linear.product(x) + self.branch(x))

    def delta(self, weight: Tensor) -> Tensor:
        delta = torch.zeros_like(weight)
        delta[self.tokens] = self.rows_of_tokens.detach().float()
        return delta


def wanted_tokens(model: nn.Module, config: AdapterConfig) -> dict[str, list[int]]:
    """The tokens whose rows are trained, by the name of the embeddings, or of the output projection; a plain list is of
    the input embeddings.

    Raises:
        UserError: a name that matches none of them, a token that there is not, or one twice.
    """
    asked = getattr(config, "trainable_token_indices", None)
    if not asked:
        return {}
    names = {name: module for name, module in model.named_modules() if _has_rows(model, module)}
    inputs = next((name for name, module in names.items() if module is cast(Any, model).get_input_embeddings()), None)
    found: dict[str, list[int]] = {}
    for pattern, tokens in asked.items() if isinstance(asked, Mapping) else [(inputs or "", asked)]:
        chosen = [name for name in names if matches(name, [pattern])]
        if not chosen:
            last = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"{KEY}: {pattern!r} is no embeddings or output projection{did_you_mean(pattern, last)}; "
                            f"this model has {', '.join(last) or 'none that can have trained rows'}")  # fmt: skip
        for name in chosen:
            _refuse_tokens(name, tokens, names[name].weight.shape[0])
            if matches(name, config.modules_to_save) or (
                config.target_modules != "all-linear" and matches(name, config.target_modules)
            ):
                raise UserError(f"{KEY}: {name} is in adapter.target_modules or adapter.modules_to_save too; it is "
                                "either trained by rows, or adapted, or trained in full")  # fmt: skip
            found[name] = list(tokens)
    return found


def _has_rows(model: nn.Module, module: nn.Module) -> bool:
    if isinstance(module, FrozenLinear):
        return module is cast(Any, model).get_output_embeddings()
    return FrozenEmbedding.can_take_over(module)


def _refuse_tokens(name: str, tokens: Sequence[int], rows: int) -> None:
    if beyond := [token for token in tokens if not 0 <= token < rows]:
        raise UserError(f"{KEY}: {beyond[0]}, but {name} has rows 0 to {rows - 1}; add the token to the model first")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise UserError(f"{KEY}: {twice} is there twice for {name}; name it once")


def refuse_rows(
    model: nn.Module, names: Iterable[str], adapted: Container[str], what: str, cure: str
) -> None:
    """Refuse rows of tokens where PEFT computes something else than a row in the place of another.

    Args:
        names: of the embeddings, or the output projection, that have them.
        adapted: names of the modules that have an adapter, or are trained in full.
        what, cure: what an error begins and ends with.

    Raises:
        UserError: an output projection with a bias, which PEFT leaves out of the logits; a module that has an adapter
            as well.
    """
    output, followers = cast(Any, model).get_output_embeddings(), follows(model)
    for name in dict.fromkeys(place for one in names for place in (one, followers.get(one, one))):
        if model.get_submodule(name) is output and getattr(output, "bias", None) is not None:
            raise UserError(f"{what}: {name} has a bias, which PEFT leaves out where rows of it are trained; {cure}")
        if name in adapted:
            raise UserError(f"{what}: {name} has an adapter, or is trained in full, too; it can be one of them; {cure}")


@torch.no_grad()
def put_rows_on(
    model: nn.Module, tokens: Mapping[str, Sequence[int]], dtype: torch.dtype,
    stored: Mapping[str, Tensor] | None = None,
) -> dict[str, TokenRows]:
    """Let embeddings, and output projections, have trained rows; a projection that is tied to the input embeddings has
    theirs, unless it has its own. Rows of a tied projection alone are its own, as in PEFT.

    Args:
        tokens: by the name of the module.
        dtype: of the rows.
        stored: their values; by default the frozen ones.
    """
    made = {}
    for name, ids in tokens.items():
        module = adaptable(model, name)
        weight = cast(FrozenLinear | FrozenEmbedding, module).weight
        index = torch.tensor(list(ids), device=weight.device)
        rows = weight.rows(index) if weight.kind in ("none", "int8") else weight.dense(torch.float32)[index]
        values = rows if stored is None else stored[name].to(weight.device)
        made[name] = TokenRows(ids, values.detach().to(dtype, copy=True))
        module.add_adapter("tokens", made[name].train(model.training))
    for one, other in follows(model).items():
        if one in made and other not in made:
            adaptable(model, other).add_adapter("tokens", made[one])
    return made


def follows(model: nn.Module) -> dict[str, str]:
    """The output projection that has the rows of its input embeddings, by the embeddings' name, where they are tied."""
    inputs = cast(Any, model).get_input_embeddings()
    pairs = [(one.removesuffix(".weight"), other.removesuffix(".weight"))
             for tied in tied_names(model).items() if all(name.endswith(".weight") for name in tied)  # biases are too
             for one, other in (tied, tied[::-1])]  # fmt: skip
    return {one: other for one, other in pairs if model.get_submodule(one) is inputs}
