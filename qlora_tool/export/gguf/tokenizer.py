"""A transformers tokenizer as a GGUF file describes it: vocabulary, merges, kinds of tokens, and which way of splitting
text before the merges llama.cpp is to use.

llama.cpp knows ways of splitting by name (`tokenizer.ggml.pre`). Which one a tokenizer has is read from its own
pre-tokenizer, not guessed from its vocabulary, so that a tokenizer that was extended or trained anew is known too.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.data.raw_text import added_around
from qlora_tool.errors import UserError
from qlora_tool.inference.ends import generation_settings, listed, with_trained
from qlora_tool.model.open import open_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"
# (how text is split, step by step; whole words before merges) → llama.cpp's name
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


@dataclass
class GgufTokenizer:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE).
        pre: how text is split before the merges.
        tokens, types: by id, one for every row of the embeddings.
        merges: `gpt2`: pairs in order.
        scores: `llama`: a merge with a higher score comes first.
        add_space_prefix: `llama`: whether a space is put before the text.
        special: ids of bos, eos, eot, eom, unk and pad, where there are such.
        add_bos, add_eos: whether they are put around a text, prompts among them.
        chat_template: or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, base_folder: Path, vocabulary: int) -> GgufTokenizer:
    """Describe the tokenizer of a model folder.

    Args:
        folder: with the tokenizer's files.
        base_folder: whose generation settings name the ends of a turn.
        vocabulary: rows of the embeddings; ids that the tokenizer does not use become unused tokens.

    Raises:
        UserError: no tokenizer, one of more tokens than the embeddings have rows, or one that llama.cpp cannot repeat.
    """
    try:
        tokenizer = open_tokenizer(folder)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except (UserError, ValueError, AttributeError) as error:
        raise UserError(
            f"--format gguf: {folder}: no tokenizer that the tokenizers library reads ({str(error).splitlines()[0]}); "
            "a GGUF file carries its tokenizer: put tokenizer.json there, or choose --format safetensors"
        ) from error
    if state["model"]["type"] != "BPE":
        raise UserError(
            f"--format gguf: {folder}: its tokenizer is of type {state['model']['type']}; known are byte-level BPE and "
            "SentencePiece's BPE; choose --format safetensors"
        )
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--format gguf: {folder}: its tokenizer has {len(tokenizer)} tokens, the model's embeddings {vocabulary} "
            "rows; the tokenizer has to be the one that the model was trained with"
        )
    steps = _flat(state.get("pre_tokenizer"))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    result = _byte_level(folder, state, steps) if byte_level else _sentencepiece(folder, state, steps)
    result.tokens, result.types = _vocabulary(state, vocabulary, result.model)
    if result.model == "llama":
        result.scores = _scores(state, result.tokens, result.types)
    _add_special(result, tokenizer, base_folder)
    template = tokenizer.chat_template
    result.chat_template = template.get("default") if isinstance(template, dict) else template
    return result


def _flat(step: dict[str, Any] | None, inner: str = "pretokenizers") -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for child in step[inner] for part in _flat(child, inner)] if step["type"] == "Sequence" else [step]


def _byte_level(folder: Path, state: dict[str, Any], steps: list[dict[str, Any]]) -> GgufTokenizer:
    splits = tuple(split for step in steps if (split := _split_of(step)) is not None)
    whole_words = bool(state["model"].get("ignore_merges"))
    pre = _SPLITS.get((splits, whole_words))
    # NFC changes no text that is composed already, which nearly all is; llama.cpp leaves it out.
    odd = [step["type"] for step in _flat(state.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if pre is None or odd or any(step.get("add_prefix_space") for step in steps):
        found = odd or [step["type"] for step in steps]
        raise UserError(
            f"--format gguf: {folder}: its tokenizer splits text in a way ({', '.join(found)}) that matches none of "
            f"llama.cpp's supported pre-tokenizers ({', '.join(_SPLITS.values())}); choose --format safetensors"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return GgufTokenizer("gpt2", pre, [], [], merges=merges)


def _split_of(step: dict[str, Any]) -> str | None:
    """The regular expression that one step of a pre-tokenizer splits by; None where it splits nothing."""
    if step["type"] == "ByteLevel":
        return _GPT2 if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGITS
    isolates = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] == "Split" and isolates and "Regex" in step["pattern"]:
        return step["pattern"]["Regex"]
    return f"an unknown step: {step['type']}"


def _sentencepiece(folder: Path, state: dict[str, Any], steps: list[dict[str, Any]]) -> GgufTokenizer:
    """SentencePiece's BPE as transformers keeps it: spaces are ▁, bytes are the tokens <0x00> to <0xFF>."""
    normalizers = _flat(state.get("normalizer"), "normalizers")
    known = {"Prepend", "Replace", "Metaspace", "Split"}
    odd = [step["type"] for step in (*normalizers, *steps) if step["type"] not in known]
    if odd or "<0x0A>" not in state["model"]["vocab"]:
        found = ", ".join(odd) or "no tokens for single bytes"
        raise UserError(
            f"--format gguf: {folder}: its tokenizer is neither byte-level BPE nor SentencePiece's ({found}); choose "
            "--format safetensors"
        )
    prefix = any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )
    return GgufTokenizer("llama", "default", [], [], add_space_prefix=prefix)


def _vocabulary(state: dict[str, Any], size: int, model: str) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    unknown = state["model"].get("unk_token")
    for token, index in state["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
        if model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[index] = BYTE
    for added in state["added_tokens"]:
        index, content = added["id"], added["content"]
        types[index] = CONTROL if added["special"] else USER_DEFINED
        # llama.cpp looks for added tokens in the text itself, where a space is a space.
        tokens[index] = content if added["special"] or model == "gpt2" else content.replace("▁", " ")
    if model == "llama" and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _scores(state: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """llama.cpp merges the pair whose whole has the highest score; transformers the one that is listed first. So a
    token's score is how early a merge makes it."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        first.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(state["model"]["merges"])
    return [
        0.0 if kind == BYTE else -float(first.get(token, last)) if kind == NORMAL else -1e6
        for token, kind in zip(tokens, types, strict=True)
    ]


def _add_special(result: GgufTokenizer, tokenizer: Any, base_folder: Path) -> None:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
           "pad": tokenizer.pad_token_id}  # fmt: skip
    result.special = {name: index for name, index in ids.items() if index is not None}
    named = listed(generation_settings(base_folder).get("eos_token_id"))
    others = [end for end in with_trained(named, tokenizer) if end != ids["eos"]]
    result.special |= dict(zip(("eot", "eom"), others, strict=False))  # beside the end of text: of turn, of message
    if len(others) > 2:
        unnamed = ", ".join(str(token) for token in tokenizer.convert_ids_to_tokens(others[2:]))
        logger.warning("--format gguf: a GGUF file names three tokens that end an answer; not named in it: %s", unnamed)
    before, _ = added_around(tokenizer)
    result.add_bos = ids["bos"] is not None and before[:1] == [ids["bos"]]
    # Never an end behind it: llama.cpp would put that behind prompts, too.
