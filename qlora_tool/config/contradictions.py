"""Keys that are right by themselves and wrong together."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_tool.config.keys import Config
from qlora_tool.config.messages import found
from qlora_tool.errors import did_you_mean
from qlora_tool.methods.starts import OF_ERRORS

# What most families call their input embeddings and output projection.
_EMBEDDING_MODULES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# Of prompts that are answered while a run trains.
FROM_DISK = "but model.weights: disk would read the whole base for every token of an answer"
ASK_LATER = "leave it out, and ask `qlora-tool generate` after the run"


def evaluation_losses(config: Config) -> dict[str, str]:
    """What `training.metric_for_best_model` may be, and the name that each has in `metrics.jsonl`.

    As with transformers, `eval_` may be left out; the loss of one of several sets has the set's name in it.
    """
    names = list(config.data.eval) if isinstance(config.data.eval, dict) else []
    keys = {"loss": "eval_loss", "eval_loss": "eval_loss"}
    for name in names:
        key = f"eval_{name}_loss" if len(names) > 1 else "eval_loss"
        for accepted in (f"eval_{name}_loss", f"{name}_loss"):
            keys.setdefault(accepted, key)
    return keys


def contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each contradiction: its keys, the one to blame first, and what to say of that one."""
    yield from _of_adapter(config)
    yield from _of_start(config)
    yield from _of_weights(config)
    yield from _of_training(config)


def _of_weights(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What cannot be streamed, and layers that stay where none are said to be."""
    weights, staying = config.model.weights, config.model.resident_layers
    adapter = config.adapter
    if weights in ("host", "disk") and adapter.methods[adapter.method].trains_base:
        message = f"{weights}, but method {adapter.method} trains the base's own weights, on the device; leave it out"
        yield ("model.weights", "adapter.method"), message
    if staying and weights in ("auto", "resident"):
        chooses = "chooses it" if weights == "auto" else "keeps all of them"
        message = f"{staying}, but model.weights: {weights} {chooses}; leave it out, or set weights: host or disk"
        yield ("model.resident_layers", "model.weights"), message


def _of_adapter(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    adapter = config.adapter
    for key in adapter.unread():
        message = f"{found(getattr(adapter, key))}, but method {adapter.method} does not read it; leave it out"
        yield (f"adapter.{key}", "adapter.method"), message
    if adapter.methods[adapter.method].trains_base:
        trains = f"but method {adapter.method} trains the base's own weights"
        if config.model.quantization != "none":
            message = f"{found(config.model.quantization)}, {trains}; set model.quantization: none"
            yield ("model.quantization", "adapter.method"), message
        if config.model.embeddings == "int8":
            yield ("model.embeddings", "adapter.method"), f"int8, {trains}; leave it out"
    in_full = [name for name in adapter.modules_to_save if name.rpartition(".")[2] in _EMBEDDING_MODULES]
    if config.model.embeddings == "int8" and in_full:
        message = f"int8, but adapter.modules_to_save trains '{in_full[0]}' in full; leave one of the two out"
        yield ("model.embeddings", "adapter.modules_to_save"), message
    if adapter.target_modules == [] and not getattr(adapter, "target_parameters", None):
        message = "expected all-linear, names that modules end in, or one regular expression, found []"
        yield ("adapter.target_modules",), message
    both = [name for name in adapter.modules_to_save if name in adapter.target_modules]
    if both and not isinstance(adapter.target_modules, str):
        message = f"'{both[0]}' is in adapter.target_modules too; a module is either trained in full or adapted"
        yield ("adapter.modules_to_save", "adapter.target_modules"), message


def _of_start(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What starts of A and B need, and keys that only one of them reads."""
    adapter, key = config.adapter, "adapter.init_lora_weights"
    start = getattr(adapter, "init_lora_weights", "default")
    usual = start in ("default", "gaussian")
    if not usual and adapter.method == "dora":
        message = f"{start}, but method dora starts at the base's own weights; leave it out, or set method: lora"
        yield (key, "adapter.method"), message
    if start in OF_ERRORS and config.model.quantization == "none":
        message = (f"{start}, but model.quantization: none leaves no error to start from; leave it out, or set "
                   "model.quantization: nf4")  # fmt: skip
        yield (key, "model.quantization"), message
    if getattr(adapter, "loftq_iter", 1) != 1 and start != "loftq":
        message = f"{adapter.loftq_iter}, but init_lora_weights is {start}; set init_lora_weights: loftq"  # type: ignore[attr-defined]
        yield ("adapter.loftq_iter", key), message


def _of_training(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    data, training = config.data, config.training
    if data.format == "text" and data.train_on == "completion":
        message = "completion cannot go with data.format text, which is trained on every token; leave it out or set all"
        yield ("data.train_on", "data.format"), message
    if training.eval_steps is not None and data.eval is None and not training.eval_prompts:
        message = f"{training.eval_steps}, but there is nothing to evaluate; set data.eval, or leave eval_steps out"
        yield ("training.eval_steps", "data.eval"), message
    yield from _of_sharding(config)
    yield from _of_evaluations(config)
    yield from _of_prompts(config)
    if training.group_by_length and data.packing:
        message = "true, but packed rows are of one length already; set data.packing: false, or leave it out"
        yield ("training.group_by_length", "data.packing"), message
    if training.group_by_length and not data.shuffle:
        message = "true, but data.shuffle: false keeps the file's order; leave one of the two out"
        yield ("training.group_by_length", "data.shuffle"), message
    if training.optimizer_in_backward and training.gradient_accumulation_steps > 1:
        message = "true, but gradients of several passes are summed before a step; leave one of the two out"
        yield ("training.optimizer_in_backward", "training.gradient_accumulation_steps"), message
    if training.optimizer_in_backward and training.max_grad_norm:
        message = "true, but clipping needs all gradients before the first step; set training.max_grad_norm: 0"
        yield ("training.optimizer_in_backward", "training.max_grad_norm"), message


def _of_prompts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What answers to prompts while it trains need."""
    prompts, key = config.training.eval_prompts, "training.eval_prompts"
    if prompts and config.model.weights == "disk":
        yield (key, "model.weights"), f"{found(prompts)}, {FROM_DISK}; {ASK_LATER}"
    if isinstance(prompts, int) and config.data.eval is None:
        yield (key, "data.eval"), f"{prompts}, but no rows are held out; set data.eval, or give prompts"
    elif isinstance(prompts, int) and config.data.train_on == "all":
        message = f"{prompts}, but with data.train_on: all no row says where its answer begins; give prompts"
        yield (key, "data.train_on"), message


def _of_sharding(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is not shared out over processes."""
    if config.training.sharding == "none":
        return
    key = "training.sharding"
    if config.adapter.method == "full":
        message = "fsdp shares out the frozen base, and with method: full nothing is frozen; leave it out"
        yield (key, "adapter.method"), message
    if config.training.eval_prompts:
        message = ("fsdp, but answers to training.eval_prompts are written by one process with the whole base; set "
                   "sharding: none, or leave the prompts out")  # fmt: skip
        yield (key, "training.eval_prompts"), message
    if config.model.weights not in ("auto", "resident"):
        message = f"fsdp, but model.weights: {config.model.weights} keeps the base elsewhere; leave one of the two out"
        yield (key, "model.weights"), message


def _of_evaluations(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the best evaluation and stopping early need."""
    training = config.training
    wanted = {
        "load_best_model_at_end": "true" if training.load_best_model_at_end else None,
        "early_stopping_patience": training.early_stopping_patience,
    }
    for key, value in wanted.items():
        if value is not None and config.data.eval is None:
            message = f"{value}, but nothing is evaluated; set data.eval and training.eval_steps, or leave it out"
            yield (f"training.{key}", "data.eval"), message
        elif value is not None and training.eval_steps is None:
            message = f"{value}, but the only evaluation is at the end; set training.eval_steps, or leave it out"
            yield (f"training.{key}", "training.eval_steps"), message
    metric, known = training.metric_for_best_model, evaluation_losses(config)
    if metric not in known:
        message = f"'{metric}' is not evaluated; expected one of {', '.join(known)}{did_you_mean(metric, known)}"
        yield ("training.metric_for_best_model", "data.eval"), message
