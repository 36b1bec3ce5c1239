"""How many of a model's answers equal the expected ones, by plain transformers (a minute).

Nothing of qlora-tool takes part. An answer is generated greedily, at most 256 new tokens, up to the end-of-turn token.
Both sides are stripped of outer white space; then they are equal or they are not.

    tools/measure exact-match MODEL_FOLDER eval.jsonl
    tools/measure exact-match MODEL_FOLDER eval.jsonl other.jsonl --json result.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from measuring.command import rows_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder: nothing is to be fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BATCH = 40


def load(folder: str):
    """The model, in float32 on a CPU and as it is stored on a GPU, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if device == "cuda" else torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """The model's answer to each prompt, special tokens left out."""
    import torch

    found = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in a batch
    for start in range(0, len(prompts), BATCH):
        chosen = by_length[start : start + BATCH]
        inputs = tokenizer(
            [prompts[index] for index in chosen], padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            outputs = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=256,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for index, output in zip(chosen, outputs[:, inputs["input_ids"].shape[1] :], strict=True):
            found[index] = tokenizer.decode(output, skip_special_tokens=True).strip()
        print(f"  {min(start + BATCH, len(prompts))} of {len(prompts)} answered", file=sys.stderr, flush=True)
    return found


def measure(model, tokenizer, file: Path, limit: int | None) -> dict[str, Any]:
    """Exact match on a file of conversations whose last message is the expected answer."""
    lines = rows_of(file)[:limit]
    conversations = [json.loads(line)["messages"] for line in lines]
    prompts = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    rows = []
    for messages, answer in zip(conversations, answers(model, tokenizer, prompts), strict=True):
        rows.append({"text": messages[-2]["content"], "expected": messages[-1]["content"].strip(), "answer": answer})
    equal = sum(row["answer"] == row["expected"] for row in rows)
    return {"file": str(file), "rows": len(rows), "exact_match": equal / len(rows), "answers": rows}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_FOLDER", help="a model folder")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl files in the messages form")
    parser.add_argument("--limit", type=int, help="only the first rows of each file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and every answer here")


def run(options: argparse.Namespace) -> None:
    logging.disable(logging.WARNING)
    model, tokenizer = load(options.model)
    results = [measure(model, tokenizer, file, options.limit) for file in options.files]
    for result in results:
        print(f"{result['file']}: exact match {result['exact_match']:.1%} of {result['rows']} rows")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
