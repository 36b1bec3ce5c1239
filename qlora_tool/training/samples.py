"""Answers to fixed prompts, or to held-out rows, while a run trains: before the first step, at every evaluation and
after the last step.

They are greedy and short, and the steps stay those of a run that nobody asks: the model is back in its mode, nothing
random is drawn, and no weight is held dense. A batch of prompts has at most half the tokens of the run's largest batch,
so that its keys and values, at most two hidden states a token and layer, fit where a step's activations lie. A single
prompt may have more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_tool.config.contradictions import ASK_LATER, FROM_DISK
from qlora_tool.config.messages import found
from qlora_tool.data.labels import IGNORED
from qlora_tool.data.prompts import Prompt, prompts_from_texts
from qlora_tool.errors import UserError, printable
from qlora_tool.inference.answer import Answer, answer_as_it_is, end_tokens_of, refuse_no_room
from qlora_tool.inference.sampling import Sampling
from qlora_tool.model.open import positions_of
from qlora_tool.model.source import resolve as resolve_model
from qlora_tool.terminal import progress

if TYPE_CHECKING:
    from qlora_tool.config import Config
    from qlora_tool.model.causal_lm import CausalLM
    from qlora_tool.training.run_data import RunData

KEY = "training.eval_prompts"
NEW_TOKENS = 64  # of an answer at most
_PROMPT, _ANSWER = 40, 120  # characters that are shown


@dataclass(frozen=True)
class Samples:
    """The prompts of a run, and how they are answered.

    Attributes:
        prompts: as the run's tokenizer writes them.
        ends: tokens that end an answer.
        together: prompts of a batch.
    """

    prompts: list[Prompt]
    ends: list[int]
    together: int

    def answer(self, model: CausalLM, data: RunData) -> list[Answer]:
        """The model's answers as it is now, one a prompt."""
        sampling = Sampling(max_new_tokens=NEW_TOKENS, batch_size=self.together)
        training = model.module.training
        cards = [model.device] if model.device.type == "cuda" else []
        model.module.eval()
        try:
            with torch.random.fork_rng(cards), progress("answering", len(self.prompts), "prompts") as bar:
                return answer_as_it_is(model, data.tokenizer, self.prompts, sampling, self.ends, bar.reach).each
        finally:
            model.module.train(training)

    def record(self, step: int, answers: list[Answer]) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        samples = []
        for prompt, one in zip(self.prompts, answers, strict=True):
            expected = {} if prompt.expected is None else {"expected": prompt.expected.strip()}
            samples.append({"prompt": prompt.text} | expected | one.as_json())
        return {"step": step, "samples": samples}

    def show(self, step: int, answers: list[Answer], say: Callable[[str], None]) -> None:
        """A line for each answer."""
        for prompt, one in zip(self.prompts, answers, strict=True):
            said = _line(one.text, _ANSWER) or "(nothing)"
            if one.text.strip() and one.finish_reason != "stop":
                said = f"{said.removesuffix(' ...')} ..."
            asked = prompt.where if prompt.expected is not None else _line(prompt.text, _PROMPT)
            say(f"step {step}: {asked} => {said}")


def read_samples(config: Config, data: RunData, model_config: Any, largest: int) -> Samples | None:
    """The prompts of a run: as texts, or of the first rows of data.eval, up to their first answer; None where it has
    none.

    Args:
        model_config: the model's transformers configuration.
        largest: input tokens of the run's largest batch.

    Raises:
        UserError: a prompt has more tokens than a training row may, or no room for an answer; the template refuses it;
            or nothing ends an answer.
    """
    asked = config.training.eval_prompts
    if not asked:
        return None
    if isinstance(asked, int):
        prompts = _of_rows(data, asked)
    else:
        named = ((text, f"{KEY}, prompt {number}") for number, text in enumerate(asked, start=1))
        prompts = prompts_from_texts(named, data.tokenizer, config.data.chat_template_kwargs)
    refuse_no_room(prompts, positions_of(model_config))
    longest = config.data.max_length
    faults = [f"{prompt.where}: {len(prompt.input_ids)} tokens, and data.max_length is {longest}; shorten it"
              for prompt in prompts if len(prompt.input_ids) > longest]  # fmt: skip
    if faults:
        raise UserError(faults)
    folder = resolve_model(config.model.name_or_path, config.model.revision, weights=False)
    each = max(len(prompt.input_ids) for prompt in prompts) + NEW_TOKENS
    return Samples(prompts, end_tokens_of(folder, model_config, data.tokenizer), max(1, largest // 2 // each))


def _of_rows(data: RunData, count: int) -> list[Prompt]:
    """The prompts of the first rows of the first evaluation set, with what they expect: all up to a row's first answer.

    Raises:
        UserError: no row of them has a prompt.
    """
    dataset, tokenizer = next(iter(data.evaluations.values())), data.tokenizer
    prompts = []
    for index in range(min(count, len(dataset.examples))):
        example = dataset.examples[index]
        begin = next((place for place, label in enumerate(example.labels) if label != IGNORED), 0)
        rest = example.labels[begin:]
        end = begin + (rest.index(IGNORED) if IGNORED in rest else len(rest))
        if begin > 1:  # one token is a text's beginning
            asked, said = example.input_ids[:begin], example.input_ids[begin:end]
            prompts.append(Prompt(
                asked, None, example.where, str(tokenizer.decode(asked, skip_special_tokens=True)),
                str(tokenizer.decode(said, skip_special_tokens=True)),
            ))  # fmt: skip
    if not prompts:
        raise UserError(f"{KEY}: {count}, but the first rows of data.eval have no prompt before what is trained; give "
                        "prompts")  # fmt: skip
    return prompts


def refuse_from_disk(config: Config) -> None:
    """Refuse prompts where `model.weights: auto` has chosen the disk.

    Raises:
        UserError: naming the key.
    """
    if config.training.eval_prompts and config.model.weights == "disk":
        raise UserError(f"{KEY}: {found(config.training.eval_prompts)}, {FROM_DISK}, which auto chose here; "
                        f"{ASK_LATER}")  # fmt: skip


def _line(text: str, longest: int) -> str:
    """A text on one line, its end left out where it is long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[:longest].rstrip()} ..."
