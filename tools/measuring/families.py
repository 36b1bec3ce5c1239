"""Every causal family: training, evaluation and export against plain transformers and PEFT.

Of each family a tiny model with random weights and a PEFT adapter with random numbers are made. qlora-tool trains three
steps from that adapter, every row of the data in each, in fp32 and packed where it packs; evaluates; exports merged.
The reference is transformers and PEFT, one row at a time: the losses of the three steps, the loss after them, and the
loss of the exported files as transformers loads them must agree to 4 digits. What is not trained is told with its
reason.

    tools/measure families --json families.json
    tools/measure families --only qwen3_next --only lfm2

About seven seconds a family; `--memory` predicts and watches memory in each run as well, as `qlora-tool train` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring.command import add_outputs
from measuring.results import say, show_table
from measuring.tiny_families import VOCABULARY, random_model, tiny_config

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 3
ROWS = 8
LENGTH = 128
RATE = 1e-3
DIGITS = 1e-4  # of a loss: the greatest relative difference
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


@dataclass
class Family:
    """What became of one family.

    Attributes:
        name: its model type.
        rows: how examples are laid out: `packed`, `masks` (packed, with masks of row by row) or `padded`.
        losses: of qlora-tool, by what they are of: each step, after training, the exported files; `expected` the same
            by transformers and PEFT.
        refused: qlora-tool's reason for not training it.
        left_out: why it could not be tried: no tiny model can be made of it, or it is none of text.
        draws: its code draws random numbers in training, so that no two trainings are alike: what was trained is then
            held against PEFT with the same adapter.
        remarks: what the run warned of.
        seconds: it took in all.
    """

    name: str
    rows: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    left_out: str = ""
    draws: bool = False
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def difference(self) -> float:
        """The greatest relative difference of two losses, of those that there are two of."""
        both = self.losses.keys() & self.expected.keys()
        return max((abs(self.losses[key] / self.expected[key] - 1) for key in both), default=0.0)

    @property
    def equal(self) -> bool:
        """Whether all losses agree."""
        return bool(self.losses) and self.losses.keys() == self.expected.keys() and self.difference < DIGITS

    @property
    def verdict(self) -> str:
        if self.left_out:
            return "left out"
        return "refused" if self.refused else "equal" if self.equal else "DIFFERS"


def causal_families() -> list[str]:
    """The model types of which transformers makes a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(name: str, folder: Path, memory: bool = False, **values: Any) -> Family:
    """Train, evaluate and export a tiny model of a family, and the reference beside it.

    Args:
        folder: empty, or not there.
        memory: predict and watch the run's memory.
        values: of its configuration, beside those of `tiny_config`.
    """
    family, start = Family(name), time.perf_counter()
    try:
        _make(name, folder, values)
    except Exception as error:  # what transformers says of a configuration can be anything
        family.left_out = _in_a_line(error)
        return family
    from qlora_tool.errors import ToolError

    with _remarks(family.remarks):
        try:
            _ours(family, folder, memory)
        except ToolError as error:
            family.refused = error.lines[0].replace(f"{folder}/", "")
            return family
        except Exception as error:  # a fault of ours
            family.refused = f"{type(error).__name__}: {_in_a_line(error)}"
            return family
    try:
        family.expected = _reference(folder, family.draws)
        if family.draws:
            family.losses = {key: value for key, value in family.losses.items() if not key.startswith("step")}
    except Exception as error:
        family.remarks.append(f"reference: {_in_a_line(error)}")
    family.seconds = round(time.perf_counter() - start, 1)
    return family


def _in_a_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


# ----------------------------------------------------------------------------------------------------- model and data


def _make(name: str, folder: Path, values: dict[str, Any]) -> None:
    """`base`, its tokenizer, `start` (an adapter of PEFT's with random numbers) and `rows.jsonl`."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = random_model(tiny_config(name, **values))
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=_linear(model), init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(model.float(), adapter)
    for parameter in peft.parameters():
        parameter.data.mul_(0.3 if parameter.requires_grad else 1.0)
    peft.save_pretrained(folder / "start")
    write_rows(folder / "rows.jsonl")


def _linear(model: Any) -> str:
    """An expression for all linear modules but the output layer, what PEFT refuses to adapt beside a recurrence, what
    it writes and does not find again (inkling2's), what the family multiplies by without calling the module
    (mamba's dt_proj, longcat_flash's router), and, in a model with experts, what PEFT takes for experts' weights by its
    name."""
    head = model.get_output_embeddings()
    experts = any(parameter.dim() == 3 and "expert" in name for name, parameter in model.named_parameters())
    of_experts = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3") if experts else ()
    names = []
    for name, module in model.named_modules():
        beside = model.get_submodule(name.rpartition(".")[0])
        refused = name.endswith("out_proj") and any("conv" in child for child, _ in beside.named_children())
        refused = refused or name.endswith((*of_experts, "sconv.weight_proj", "router.classifier", "dt_proj"))
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and module is not head and not refused:
            names.append(re.escape(name))
    return "|".join(names)


def byte_tokenizer() -> Any:
    """A tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|end|>", "<|assistant|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    assert len(tokens) <= VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def write_rows(file: Path, rows: int = ROWS) -> None:
    """Questions and answers of different lengths."""
    words = ("red", "green", "blue", "black", "white", "grey")
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            answer = " and ".join(words[(number + step) % 6] for step in range(1 + number % 5))
            turns = [("user", f"{number} plus {number % 7}?"), ("assistant", f"{number + number % 7}, {answer}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def _examples(folder: Path) -> Iterator[tuple[Tensor, int]]:
    """Each row's tokens (1, length), and how many of them are the prompt."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        yield torch.tensor([ids]), len(tokenizer(prompt, add_special_tokens=False).input_ids)


# ----------------------------------------------------------------------------------------------------------- qlora-tool


def _ours(family: Family, folder: Path, memory: bool) -> None:
    from measuring.ours import behaviour_in, train_alone
    from qlora_tool import evaluate, export_merged, train

    run, rows = folder / "run", str(folder / "rows.jsonl")
    config = {
        "model": {"name_or_path": str(folder / "base"), "quantization": "none", "compute_dtype": "float32",
                  "device": "cpu"},
        "adapter": {"init_from": str(folder / "start")},
        "data": {"train": rows, "max_length": LENGTH},
        "training": {
            "output_dir": str(run), "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": RATE,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        },
    }  # fmt: skip
    (train if memory else train_alone)(config)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    family.losses = {f"step {number}": json.loads(line)["loss"] for number, line in enumerate(lines, 1)}
    family.rows, family.draws = behaviour_in(run / "config.yaml")
    family.losses["after"] = evaluate(run, rows, compute_dtype="float32").as_json()["loss"]
    export_merged(run, folder / "merged", dtype="float32", verify=False)
    family.losses["export"] = _loss(_plain(folder / "merged"), folder)


@contextmanager
def _remarks(found: list[str]) -> Iterator[None]:
    """What qlora-tool warns of meanwhile is put into `found`."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("qlora_tool")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# ------------------------------------------------------------------------------------------------------------ reference


def _plain(folder: Path) -> Any:
    """A model as transformers loads it, in fp32; with a cap on the scores by the code that has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    capped = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def _reference(folder: Path, draws: bool) -> dict[str, float]:
    """The same losses by transformers and PEFT, one row at a time."""
    import torch
    from peft import PeftModel

    if draws:
        trained = _loss(PeftModel.from_pretrained(_plain(folder / "base"), folder / "run/adapter").eval(), folder)
        return {"after": trained, "export": trained}
    model = PeftModel.from_pretrained(_plain(folder / "base"), folder / "start", is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = {}
    for step in range(1, STEPS + 1):
        losses[f"step {step}"] = _loss(model, folder, backward=True)
        optimizer.step()
        optimizer.zero_grad()
    losses["after"] = _loss(model.eval(), folder)
    return losses | {"export": losses["after"]}


def _loss(model: Any, folder: Path, backward: bool = False) -> float:
    """The mean over the answers' tokens of all rows."""
    import torch

    examples = list(_examples(folder))
    count = sum(ids.shape[1] - prompt for ids, prompt in examples)
    total = 0.0
    with torch.set_grad_enabled(backward):
        for ids, prompt in examples:
            logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].float()
            part = torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="sum") / count
            if backward:
                part.backward()
            total += float(part.detach())
    return total


# --------------------------------------------------------------------------------------------------------- the subject


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="TYPE", help="this family alone; repeatable")
    parser.add_argument("--memory", action="store_true", help="predict and watch memory, too")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table of docs/families.md to FILE")
    add_outputs(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from measuring.sides import quiet_transformers

    quiet_transformers()
    found = []
    for name in options.only or causal_families():
        with tempfile.TemporaryDirectory() as folder:
            family = try_family(name, Path(folder), options.memory)
        found.append(family)
        say(f"{name}: {family.verdict}, {family.rows} {family.difference:.1e} "
            f"{family.refused or family.left_out} ({family.seconds} s)")  # fmt: skip
    if options.table is not None:
        options.table.write_text(table(found), encoding="utf-8")
    return judge(found)


def judge(families: Iterable[Family]) -> dict[str, Any]:
    """All that were found, and whether every one that was tried is equal or refused, at most a tenth of them."""
    tried = [family for family in families if not family.left_out]
    refused = [family for family in tried if family.refused]
    differ = [family for family in tried if family.verdict == "DIFFERS"]
    passed = not differ and len(refused) <= len(tried) / 10
    return {"passed": passed, "families": [asdict(family) | {"verdict": family.verdict} for family in families]}


def table(families: Iterable[Family]) -> str:
    """What became of the families that were tried, as a table in Markdown."""
    lines = ["| family | rows | greatest difference of a loss | |", "| --- | --- | --- | --- |"]
    for family in families:
        if not family.left_out:
            figure = f"{family.difference:.0e}" if family.losses and family.expected else ""
            drawn = "draws random numbers in training: what was trained is held against PEFT" if family.draws else ""
            said = f"not trained: {family.refused}" if family.refused else drawn if family.equal else "differs"
            lines.append(f"| {family.name} | {family.rows} | {figure} | {said.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def show(results: dict[str, Any]) -> None:
    families = results["families"]
    counts = {verdict: sum(family["verdict"] == verdict for family in families)
              for verdict in ("equal", "refused", "DIFFERS", "left out")}  # fmt: skip
    show_table([("verdict", "families"), *counts.items()])
