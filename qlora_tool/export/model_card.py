"""The README.md of an export: what it was made from, how, how faithful it is, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from qlora_tool._version import __version__
from qlora_tool.artifacts import Artifact
from qlora_tool.config.sources import told
from qlora_tool.files.reading import LARGEST, is_regular, json_value
from qlora_tool.model.config_file import read_config_file
from qlora_tool.model.tokenizer_files import has_tokenizer
from qlora_tool.run_folder import RunFolder
from qlora_tool.sizes import counted, file_size, memory_size, noun_of

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from qlora_tool.export.verification import Proof

_PIPELINE = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="{folder}")
print({call})
```"""
_CHAT = 'generate([{"role": "user", "content": "Hello"}], max_new_tokens=64)[0]["generated_text"][-1]["content"]'
_TEXT = 'generate("Once upon a time", max_new_tokens=64)[0]["generated_text"]'
_GGUF = """With llama.cpp:

```
llama-cli -m {folder}/{file} -p "{prompt}"
```

With transformers, which turns it back into full weights (`pip install gguf`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{file}")
tokenizer = AutoTokenizer.from_pretrained("{folder}", gguf_file="{file}")
```"""
_GGUF_ADAPTER = """The file of the adapter is `{file}`. Its base: {base}.

{left}{ollama}With llama.cpp:

```
llama-cli -m {model} --lora {folder}/{file} -p "{prompt}"
```"""
_OLLAMA = """With Ollama:

```
cd {folder}
ollama create {name} -f Modelfile
ollama run {name}
```

"""
_MISREAD = """`AutoTokenizer` of some transformers, {version} among them, reads `tokenizer.json` otherwise than it is
written and than this model was trained. Load the tokenizer by `PreTrainedTokenizerFast.from_pretrained("{folder}")`,
and give it to a pipeline as `tokenizer=`."""
_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}{quantized})
{resized}model = PeftModel.from_pretrained(base, "{folder}")
{ends}tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
```"""


def model_card(
    artifact: Artifact,
    base_folder: Path,
    result: dict[str, Any],
    *,
    chat: bool,
    misread: bool = False,
    proof: Proof | None = None,
) -> str:
    """The card in Markdown, with the header that model hubs read. Nothing in it changes when the export is repeated.

    Args:
        artifact: what was exported.
        base_folder: its base's.
        result: what `export_merged` returns.
        chat: whether the tokenizer has a chat template.
        misread: whether transformers' `AutoTokenizer` reads the tokenizer otherwise than its file says.
        proof: how the files compare with the live model; None where nobody asked.
    """
    from huggingface_hub import ModelCard

    base = result["base"] if _format(result).startswith("adapter") else artifact.model.name_or_path
    licence = _licence(base_folder)
    sections = [
        f"---\n{_header(artifact, licence, result)}\n---",
        f"# {Path(result['output_dir']).name}",
        f"`{base}`, fine-tuned with its weights {_quantization(artifact)} and {_exported(result)} by qlora-tool "
        f"{__version__}.",
        _load(artifact, result, chat),
        *_other_base(artifact, result),
        *([_MISREAD.format(folder=result["output_dir"], version=version("transformers"))] if misread else []),
        *_verification(proof, result),
        "## How it was made",
        _table(_facts(artifact, result)),
    ]
    if licence is None:
        sections.append("The base states no licence in its files: see where it comes from before you pass this on.")
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _header(artifact: Artifact, licence: str | None, result: dict[str, Any]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    kinds = {"gguf": "gguf", "gguf-adapter": "gguf", "adapter": "peft", "adapter-portable": "peft"}
    library = kinds.get(_format(result), "transformers")
    base = artifact.model.name_or_path
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if _is_adapter(result) else "finetune") if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        license=licence or "unknown",
        tags=["qlora-tool", artifact.adapter.method.name],
    )


def _format(result: dict[str, Any]) -> str:
    return result.get("format", "safetensors")


def _is_adapter(result: dict[str, Any]) -> bool:
    return "adapter" in _format(result)


def _exported(result: dict[str, Any]) -> str:
    named = {"gguf": "merged into GGUF", "nf4": "merged and quantized to nf4 again",
             "fp4": "merged and quantized to fp4 again", "adapter": "saved as an adapter",
             "adapter-portable": "saved as an adapter",
             "gguf-adapter": "saved as an adapter for llama.cpp"}  # fmt: skip
    return named.get(_format(result), "merged")


def _load(artifact: Artifact, result: dict[str, Any], chat: bool) -> str:
    folder, kind = result["output_dir"], _format(result)
    if kind.startswith("gguf"):
        prompt = "Hello" if chat else "Once upon a time"
        ollama = _OLLAMA.format(folder=folder, name=Path(folder).name.lower())
        if kind == "gguf":
            return ollama + _GGUF.format(folder=folder, file=result["files"][0], prompt=prompt)
        facts, beside = result["gguf_adapter"], len(result["files"]) > 1
        left = "; ".join(facts.get("left_to_base") or ())
        return _GGUF_ADAPTER.format(
            folder=folder, file=facts["file"], base=facts["base"], prompt=prompt, ollama=ollama if beside else "",
            left=f"Not in an adapter's file: {left}.\n\n" if left else "",
            model=f"{folder}/{result['files'][1]}" if beside else "BASE.gguf",
        )  # fmt: skip
    if kind.startswith("adapter"):
        return _load_adapter(artifact, result)
    needed = "It takes `pip install bitsandbytes accelerate`.\n\n" if kind in ("nf4", "fp4") else ""
    return needed + _PIPELINE.format(folder=folder, call=_CHAT if chat else _TEXT)


def _load_adapter(artifact: Artifact, result: dict[str, Any]) -> str:
    folder, base, rows = result["output_dir"], result["base"], result.get("resize_token_embeddings")
    revision, ends = artifact.model.revision, result.get("eos_token_id")
    return _ADAPTER.format(
        folder=folder,
        base=base,
        tokenizer=folder if has_tokenizer(artifact.adapter.folder) else base,
        revision=f', revision="{revision}"' if revision and not Path(base).is_dir() else "",
        quantized=_as_trained(artifact),
        ends=f"model.generation_config.eos_token_id = {ends}  # where answers end, beside the base's\n" if ends else "",
        resized=f"base.resize_token_embeddings({rows})  # for the tokens that were added\n" if rows else "",
    )


def _as_trained(artifact: Artifact) -> str:
    """The argument by which transformers quantizes the base as it was."""
    kind, double = artifact.model.quantization, artifact.model.double_quant
    if kind == "none":
        return ""
    settings = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double
    }  # fmt: skip
    if isinstance(skipped := artifact.model.skip_modules, list) and skipped:
        settings["llm_int8_skip_modules"] = ["lm_head", *skipped]
    return f", quantization_config={ {'quant_method': 'bitsandbytes', **settings} }"


def _other_base(artifact: Artifact, result: dict[str, Any]) -> list[str]:
    """What to know where the base that was trained on is not the one that PEFT makes of the same files."""
    return [*_beyond_peft(artifact, result), *_without_start(artifact, result)]


def _without_start(artifact: Artifact, result: dict[str, Any]) -> list[str]:
    kind = artifact.model.quantization
    if artifact.adapter.quantized_without is None or kind == "none" or not _format(result).startswith("adapter"):
        return []
    return [
        f"The base that it was trained on was quantized ({kind}) without what the adapter took over at its start "
        f"({artifact.adapter.start.get('init_lora_weights')}). On a base in 16 bits it gives what was trained up to "
        f"the quantization's error; on one that another program quantizes to {kind}, with other errors than those that "
        "were trained against. qlora-tool makes the base again from this adapter; merged by it, it is exact everywhere."
    ]


def _beyond_peft(artifact: Artifact, result: dict[str, Any]) -> list[str]:
    found = (artifact.adapter.provenance or {}).get("beyond_peft")
    if not found:
        return []
    names = ", ".join(f"`{name}`" for name in found["names"][:4]) + (" …" if len(found["names"]) > 4 else "")
    said = (
        f"The base that it was trained on differs from the one that PEFT makes of the same files: "
        f"{counted(found['weights'], 'weight')} ({names}; {found['unquantized_bytes'] / 1e6:,.1f} MB) "
        f"{noun_of(found['weights'], 'was', 'were')} quantized to {found['kind']} too, which "
        "transformers with bitsandbytes leaves unquantized."
    )
    if _format(result).startswith("adapter"):
        said += " On PEFT's base the adapter answers otherwise (logits are off by about 1): merge it with qlora-tool."
    return [said]


def _verification(proof: Proof | None, result: dict[str, Any]) -> list[str]:
    if proof is None:
        return []
    summed = proof.live != type(proof).live
    live = proof.live if summed else "the quantized base with its adapter, as it was trained"
    files = "The base plus what the adapter's file adds, run" if _is_adapter(result) else "The files, loaded"
    about = (
        f"{files} by plain transformers, against {live}. Both "
        "multiply in float32; KL(trained ‖ exported) is of the next token's distribution."
    )
    if proof.left_out is not None:
        about = f"Left out: {proof.left_out}."
    table = [_table(facts)] if (facts := proof.table()) else []
    return ["## Verification", about, *table, *proof.warnings()]


def _quantization(artifact: Artifact) -> str:
    kind = artifact.model.quantization
    embeddings = ", its embeddings to int8," if artifact.model.embeddings == "int8" else ""
    if kind == "none":
        return f"unquantized{embeddings}"
    double = ", its scales too" if kind != "int8" and artifact.model.double_quant else ""
    return f"quantized to {kind}{double}{embeddings or ','}"


def _licence(folder: Path) -> str | None:
    """What the header of the base's card says, else its config.json."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        header = metadata_load(card) if is_regular(card) and card.stat().st_size <= LARGEST else None
    except (ValueError, YAMLError):  # not UTF-8, not YAML or no mapping: as good as none
        header = None
    if isinstance(found := (header or {}).get("license"), str):
        return found
    config = read_config_file(folder)
    return config.get("license")


def _facts(artifact: Artifact, result: dict[str, Any]) -> list[tuple[str, Any]]:
    usual = artifact.adapter.usual
    method, provenance = artifact.adapter.method, artifact.adapter.provenance or {}
    rank = f", r {usual.r}" if method.keys.reads("r") else ""
    alpha = f", alpha {usual.alpha}" if method.keys.reads("lora_alpha") else ""
    dropout = f", dropout {usual.dropout}" if usual.dropout else ""
    trained_as = provenance.get("method") or method.name  # of a method that PEFT has not, the LoRA that equals it
    equals = "" if trained_as == method.name else f", which equals what was trained as {trained_as}"
    if started := artifact.adapter.start.get("init_lora_weights"):
        equals += f", trained at r {artifact.adapter.usual_trained.r} from a {started} start"
    targets = artifact.adapter.peft.get("target_modules")
    facts = [
        ("base", artifact.model.name_or_path + (f" at {artifact.model.revision}" if artifact.model.revision else "")),
        ("not quantized", _skipped(artifact)),
        *([(f"adapter {one.name}", f"{one.weight:g} times {one.stored.method.name}, r {one.stored.usual.r}")
           for one in artifact.stack]
          or [("method" if method.keys.trains_base else "adapter", f"{method.name}{rank}{alpha}{dropout}{equals}")]),
        ("adapted modules", None if artifact.stack else ", ".join(targets) if isinstance(targets, list) else targets),
    ]  # fmt: skip
    if not _is_adapter(result):
        kind = _format(result)
        rounded = f"quantized to {kind} again" if kind in ("nf4", "fp4") else f"rounded once to {result['dtype']}"
        how = ("weights", f"the trained ones, {rounded}") if method.keys.trains_base else (
            "merged onto", f"the {result['base']} base, added in float32, {rounded}"
        )  # fmt: skip
        facts += [how,
                  ("why this dtype", result.get("dtype_reason") or None),
                  ("codes made with", _made_with(result)),
                  *_tried(result)]  # fmt: skip
    if artifact.run is not None and not artifact.stack:
        facts += [*_training(artifact), *_losses(artifact.adapter.folder.parent),
                  *_memory(artifact.adapter.folder.parent)]  # fmt: skip
    return [(name, value) for name, value in facts if value is not None]


def _tried(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What each type that was tried keeps."""
    return [
        (f"{one['gguf_type']}, tried", f"{file_size(one['bytes'])}, keeps {one['gain_kept']:.1%}, mean KL "
                                       f"{one['mean_kl']:.2g}")
        for one in result.get("candidates", ())
    ]  # fmt: skip


def _made_with(result: dict[str, Any]) -> str | None:
    """What the codes of a file of few bits were made with."""
    if (found := result.get("encoding")) is None:
        return None
    if (rows := found["calibration"]) is None:
        return "no rows: they are the nearest ones"
    return f"{rows['tokens']:,} tokens of {rows['rows']}, moved towards the trained weights' products"


def _skipped(artifact: Artifact) -> str | None:
    skipped = artifact.model.skip_modules
    if artifact.model.quantization == "none" or not skipped:
        return None
    return "what bitsandbytes has no modules for, as under PEFT" if isinstance(skipped, str) else ", ".join(skipped)


def _training(artifact: Artifact) -> list[tuple[str, Any]]:
    data, training = artifact.run.data, artifact.run.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    clipped = f"gradients clipped at a norm of {training.max_grad_norm}" if training.max_grad_norm else "no clipping"
    evaluation = ", ".join(data.eval.values()) if isinstance(data.eval, dict) else data.eval
    evaluation = told(evaluation) if isinstance(evaluation, list) else evaluation
    given = ", ".join(f"{name}={value!r}" for name, value in data.chat_template_kwargs.items())
    return [
        ("data", told(data.train)),
        ("evaluation data", evaluation),
        ("trained on", "the answers" if data.train_on == "completion" else "every token"),
        ("chat template", f"given {given}; give it the same: apply_chat_template(…, {given})" if given else None),
        ("rows a step", f"{rows}, of up to {data.max_length} tokens{', packed' if data.packing else ''}"),
        ("learning rate", f"{training.learning_rate}, {training.lr_scheduler_type}, warm-up over "
                          f"{_warm_up(training.warmup_steps)}"),
        ("optimizer", f"{training.optim}, weight decay {training.weight_decay}, {clipped}"),
        ("seed", training.seed),
    ]  # fmt: skip


def _warm_up(steps: float) -> str:
    return f"{steps:.0%} of the steps" if 0 < steps < 1 else f"{steps:g} {noun_of(steps, 'step')}"


def _losses(run: Path) -> list[tuple[str, Any]]:
    records = [record for record in RunFolder(run).records() if {"step", "loss"} <= record.keys()]
    if not records:
        return []
    evaluated = [record["eval_loss"] for record in records if isinstance(record.get("eval_loss"), float)]
    return [
        ("steps", records[-1]["step"]),
        ("training loss", f"{records[0]['loss']:.3f} → {records[-1]['loss']:.3f}"),
        ("evaluation loss", f"{evaluated[-1]:.3f}, all evaluation rows" if evaluated else None),
    ]


def _memory(run: Path) -> list[tuple[str, Any]]:
    """The peaks of a training step, from `memory.json`."""
    report = _object(run / "memory.json")
    named = {"predicted": "predicted for the largest batch", "measured": "measured in one step"}
    try:
        peaks = [f"{memory_size(report[one]['peak_bytes'])} {text}" for one, text in named.items() if report.get(one)]
        return [("memory of a training step", f"{', '.join(peaks)} on {report['device']}")] if peaks else []
    except (LookupError, TypeError):  # no run wrote it
        return []


def _object(file: Path) -> dict[str, Any]:
    """What a file of a run holds; an empty one where it is none, as the card can do without."""
    try:
        found = json_value(file.read_text(encoding="utf-8")) if is_regular(file) else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(facts: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)])
