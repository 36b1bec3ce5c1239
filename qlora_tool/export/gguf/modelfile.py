"""The `Modelfile` that Ollama makes a model of: the GGUF file beside it, its chat template, where answers stop.

Ollama writes templates in Go's language, models in Jinja. One is not translated into the other: the model's template is
run on a short conversation, and where what comes out is one of the known shapes, that shape is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tool.files.atomic import write_text
from qlora_tool.inference.ends import generation_settings, listed, with_trained
from qlora_tool.model.open import open_tokenizer

_PROBE = ("First question.", "First answer.", "Second question.")
_SYSTEM = "Some rules."
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # transformers' names and Ollama's  # fmt: skip


@dataclass(frozen=True)
class ChatShape:
    """How a conversation is written out; `{}` stands for what was said.

    Attributes:
        name: of the shape.
        system: a system turn; empty where there are none.
        user, start, answer: a user's turn, what begins an answer, and the answer with its end.
        stop: texts that end an answer.
    """

    name: str
    system: str
    user: str
    start: str
    answer: str
    stop: tuple[str, ...]

    def written(self, system: str | None, first: str, answer: str, second: str) -> str:
        """A conversation up to where the second answer begins."""
        head = self.system.format(system) if system else ""
        turns = self.user.format(first) + self.start + self.answer.format(answer)
        return head + turns + self.user.format(second) + self.start

    def go_template(self) -> str:
        """The same in Ollama's language, one exchange at a time."""
        system = f"{{{{ if .System }}}}{self.system.format('{{ .System }}')}{{{{ end }}}}" if self.system else ""
        return system + self.user.format("{{ .Prompt }}") + self.start + self.answer.format("{{ .Response }}")


SHAPES = (
    ChatShape("chatml", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
              "<|im_start|>assistant\n", "{}<|im_end|>\n", ("<|im_end|>",)),
    ChatShape("llama3", "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
              "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
              "<|start_header_id|>assistant<|end_header_id|>\n\n", "{}<|eot_id|>", ("<|eot_id|>",)),
    ChatShape("gemma", "", "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n", "{}<end_of_turn>\n",
              ("<end_of_turn>",)),
    ChatShape("phi3", "<|system|>\n{}<|end|>\n", "<|user|>\n{}<|end|>\n", "<|assistant|>\n", "{}<|end|>\n",
              ("<|end|>",)),
    ChatShape("zephyr", "<|system|>\n{}</s>\n", "<|user|>\n{}</s>\n", "<|assistant|>\n", "{}</s>\n", ("</s>",)),
    ChatShape("mistral", "", "[INST] {} [/INST]", "", " {}</s>", ("[INST]", "[/INST]", "</s>")),
    ChatShape("mistral, closely set", "", "[INST] {}[/INST]", "", " {}</s>", ("[INST]", "[/INST]", "</s>")),
)  # fmt: skip


def write_modelfile(
    file: Path, gguf_name: str, tokenizer_folder: Path, base_folder: Path, adapter: str | None = None
) -> None:
    """Write a Modelfile.

    Args:
        file: to write.
        gguf_name: of the GGUF file beside it.
        tokenizer_folder: the tokenizer's, with the chat template.
        base_folder: the base's, whose generation settings may name further ends of an answer.
        adapter: of the file of an adapter beside it.
    """
    tokenizer, settings = open_tokenizer(tokenizer_folder), generation_settings(base_folder)
    write_text(file, modelfile(tokenizer, gguf_name, with_trained(listed(settings.get("eos_token_id")), tokenizer),
                               settings, adapter))  # fmt: skip


def modelfile(
    tokenizer: Any, gguf_name: str, ends: Sequence[int] = (), settings: Mapping[str, Any] | None = None,
    adapter: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        ends: ids that end an answer beside the tokenizer's own.
        settings: the base's generation settings; where they sample, so does Ollama.
        adapter: the name of an adapter's file.
    """
    lines = [f"FROM ./{gguf_name}", *([f"ADAPTER ./{adapter}"] if adapter else []), ""]
    shape, system = find_shape(tokenizer)
    if shape is not None:
        lines += [f"# {shape.name}", f'TEMPLATE """{shape.go_template()}"""', ""]
        lines += [f'SYSTEM """{system}"""', ""] if system else []
        stop = shape.stop
    else:
        why = "its chat template has no Ollama counterpart" if tokenizer.chat_template else "it has no chat template"
        lines += [f"# No TEMPLATE: {why}; Ollama takes what the GGUF file says.", ""]
        stop = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
    stop = dict.fromkeys([*stop, *tokenizer.convert_ids_to_tokens(list(ends))])
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop]
    if settings and settings.get("do_sample"):
        named = {name: settings.get(key) for key, name in _SAMPLING.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in named.items() if value is not None]
    return "\n".join(lines).rstrip() + "\n"


def find_shape(tokenizer: Any) -> tuple[ChatShape | None, str | None]:
    """The shape that a tokenizer's chat template writes, and the system prompt that it puts where none is given."""
    if not tokenizer.chat_template:
        return None, None
    plain = _rendered(tokenizer, None)
    ruled = _rendered(tokenizer, _SYSTEM)
    for shape in SHAPES:
        expected = shape.written(None, *_PROBE)
        if plain is None or not plain.endswith(expected):
            continue
        default = _default_system(shape, plain.removesuffix(expected))
        if default is None or (shape.system and ruled != shape.written(_SYSTEM, *_PROBE)):
            continue
        return shape, default or None
    return None, None


def _default_system(shape: ChatShape, head: str) -> str | None:
    """What a template writes before the first turn, as a system prompt; empty where nothing, None where it is not."""
    before, _, after = shape.system.partition("{}")
    if not head:
        return ""
    if shape.system and head.startswith(before) and head.endswith(after):
        return head.removeprefix(before).removesuffix(after)
    return None


def _rendered(tokenizer: Any, system: str | None) -> str | None:
    """The probe as the template writes it, without the beginning of text, which the runtime puts; None where the
    template refuses it."""
    from jinja2 import TemplateError

    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _PROBE, strict=True)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None
    # SmolLM2's beginning of text is chatml's <|im_start|>, which is part of the turn.
    return text if tokenizer.bos_token in (None, "<|im_start|>") else text.removeprefix(tokenizer.bos_token)
