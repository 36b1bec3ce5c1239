"""All chat templates that `trl` brings along, against what each writes turn by turn, rendered here by itself."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_tool import preview
from qlora_tool.config import DataConfig
from qlora_tool.data.batches import collate, plan_epoch
from qlora_tool.data.tokenize import Example, build_dataset

FOUND = importlib.util.find_spec("trl")  # not imported: only its files are read
if FOUND is None:
    pytest.skip("trl is there from Python 3.11 on", allow_module_level=True)
FOLDER = Path(FOUND.origin).parent / "chat_templates"
SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
IN_PARTS = {"idefics3", "llava_next", "smolvlm"}
THINKING = {"gptoss", "lfm2_2_5"}  # they read reasoning by that name, which later transformers add themselves
JSON_ARGUMENTS = {"deepseekv3"}
# They leave tool calls out without a word; the answer that is nothing else is not trained then.
WITHOUT_CALLS = {"deepseek_r1_distill", "idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"}
NEMOTRON = {name for name in SOURCES if name.startswith("nemotron")}
SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|</?s>|<(?:start|end)_of_\w+>|<\|?(?:turn|tool_call|tool_response|channel)\|?>"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
]
THOUGHTS = {"4": "Two and two.", "9": "Four and five."}
CASES = {
    "one turn": [user("2 + 2?"), assistant("4")],
    "two turns": [user("2 + 2?"), assistant("4"), user("And 5 more?"), assistant("9")],
    "reasoning": [
        user("2 + 2?"),
        assistant("4", reasoning_content=THOUGHTS["4"]),
        user("And 5 more?"),
        assistant("9", reasoning_content=THOUGHTS["9"]),
    ],
    "reasoning inline": [
        user("2 + 2?"),
        assistant(f"<think>\n{THOUGHTS['4']}\n</think>\n\n4"),
        user("And 5 more?"),
        assistant(f"<think>\n{THOUGHTS['9']}\n</think>\n\n9"),
    ],
    "tools": [
        user("Sun in Rome?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny, 30 degrees"},
        assistant("Yes."),
    ],
    "system": [{"role": "system", "content": "Be brief."}, user("2 + 2?"), assistant("4")],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """By the template's name. GLM's generation stops at the next turn's role."""
    made = byte_level()
    made.add_special_tokens(
        {"additional_special_tokens": sorted({text for source in SOURCES.values() for text in SPECIAL.findall(source)})}
    )
    folder = tmp_path_factory.mktemp("glm")
    stops = made.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))

    def tokenizer(name):
        own = copy.deepcopy(made)
        own.chat_template = SOURCES[name]
        own.name_or_path = str(folder) if name == "glm4moe" else ""
        return own

    return tokenizer


class Template:
    """What one template writes, by transformers' own rendering."""

    def __init__(self, name, case, tokenizer):
        self.name, self.case, self.turns = name, case, CASES[case]
        self.tools = TOOLS if case == "tools" else None
        self.tokens = tokenizer.special_tokens_map

    def text(self, turns, prompt=False):
        turns = copy.deepcopy(turns)
        for turn in turns:
            if self.name in THINKING and "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
            if self.name in IN_PARTS:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
            if self.name in JSON_ARGUMENTS and "tool_calls" in turn:
                function = turn["tool_calls"][0]["function"]
                function["arguments"] = json.dumps(function["arguments"])
        ((text,), _) = render_jinja_template(
            conversations=[turns],
            chat_template=SOURCES[self.name],
            tools=self.tools,
            add_generation_prompt=prompt,
            **self.tokens,
        )
        return text

    def target(self, turn):
        """What follows the prompt: as the template has it, or worked out by hand where that does not begin so."""
        prompt, through = self.text(self.turns[:turn], prompt=True), self.text(self.turns[: turn + 1])
        said = self.turns[turn]["content"].rpartition("</think>")[2].strip()
        thought = THOUGHTS.get(said, "") if self.case.startswith("reasoning") else ""
        if self.name in ("deepseek_r1_distill", "deepseekv3") and prompt.endswith("<think>\n"):
            written = through.rpartition("<｜Assistant｜>")[2].lstrip()
            return f"{thought}\n</think>\n\n{written}"  # the template knows neither the thought nor its end
        if self.name in NEMOTRON and not thought:
            return through.rpartition("<|im_start|>assistant\n<think>")[2]  # without the prompt's line end
        if self.name == "qwen3_5_nothink" and thought:
            return f"{said}<|im_end|>\n"  # the prompt says that there is no thought
        if self.name == "qwen3_8" and self.case == "reasoning inline":
            return f"{thought}\n</think>\n\n{said}<|im_end|>\n"  # it writes an empty thought and then this one
        assert through.startswith(prompt)
        end = ""
        if self.name == "glm4moe":
            end = "<|observation|>" if self.turns[turn].get("tool_calls") else "<|user|>"
        return through[len(prompt) :] + end

    def rows(self):
        """The first prompt, the text and the trained parts of every row."""
        turns = [place for place, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        if self.name in WITHOUT_CALLS:
            turns = [place for place in turns if not self.turns[place].get("tool_calls")]
        apart = [(self.text(self.turns[:turn], prompt=True), self.target(turn)) for turn in turns]
        whole = self.text(self.turns)
        if len(apart) > 1 and all(whole.startswith(prompt + target) for prompt, target in apart[:-1]):
            last = "".join(apart[-1])
            if last.startswith(whole):
                return [(apart[0][0], last, [target for _, target in apart])]
        return [(prompt, prompt + target, [target]) for prompt, target in apart]


def refused(name, case, tokenizer):
    try:
        Template(name, case, tokenizer).text(CASES[case])
    except Exception:
        return True
    return False


def dataset(tmp_path, tokenizer, *cases, **data):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": CASES[case]} | ({"tools": TOOLS} if case == "tools" else {}) for case in cases]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_dataset(str(path), DataConfig(**{"max_length": 100_000} | data), tokenizer)


def runs(tokenizer, example):
    """The example as text, in runs of tokens that are trained or are not."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return [
        (trained, tokenizer.decode([token for token, _ in run]))
        for trained, run in itertools.groupby(pairs, lambda pair: pair[1] != -100)
    ]


def test_all_41_are_there():
    assert len(SOURCES) == 41


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_what_the_model_has_to_write_is_trained_and_nothing_else(tmp_path, tokenizers, name, case):
    tokenizer = tokenizers(name)
    if refused(name, case, tokenizer):
        assert (name, case) in REFUSED
        return
    made = dataset(tmp_path, tokenizer, case)
    expected = Template(name, case, tokenizer).rows()
    assert [tokenizer.decode(example.input_ids) for example in made.examples] == [text for _, text, _ in expected]
    for example, (prompt, _, targets) in zip(made.examples, expected, strict=True):
        trained = [part for flag, part in runs(tokenizer, example) if flag]
        if name == "llava_next" and len(targets) == 2:  # its space belongs to the token of the next turn
            targets = [targets[0].rstrip(), targets[1]]
        assert trained == targets
        sent = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # by a server
        assert example.input_ids[: len(sent)] == sent
        assert set(example.labels[: len(sent)]) == {-100}
    # Nothing that was said is missing, but for what the report names.
    trained = "".join(part for example in made.examples for flag, part in runs(tokenizer, example) if flag)
    notes = " ".join(made.report.warnings())
    for turn in CASES[case]:
        if turn["role"] != "assistant":
            continue
        said = turn["content"].rpartition("</think>")[2].strip()
        assert said in trained
        if case.startswith("reasoning") and THOUGHTS[said] not in trained:
            assert "trained without the reasoning that the data has" in notes
        if turn.get("tool_calls") and not ("weather" in trained and "Rome" in trained):
            assert "does not write tool calls" in notes


REFUSED = {
    ("cohere", "tools"),
    ("cohere2", "tools"),
    ("gemma", "system"),
    ("gemma", "tools"),
    ("gemma3", "tools"),
    ("llava_next", "tools"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_limit_cuts_the_end_and_leaves_the_rest_as_it_was(tmp_path, tokenizers, name):
    tokenizer = tokenizers(name)
    made = dataset(tmp_path, tokenizer, "two turns").examples
    longest = max(len(example.input_ids) for example in made)
    cut = dataset(tmp_path, tokenizer, "two turns", max_length=longest - 1).examples
    assert [(example.input_ids, example.labels) for example in cut] == [
        (example.input_ids[: longest - 1], example.labels[: longest - 1]) for example in made
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_packed_into_a_row_each_keeps_its_answers(tmp_path, tokenizers, name):
    tokenizer = tokenizers(name)
    cases = [case for case in CASES if (name, case) not in REFUSED]
    examples = dataset(tmp_path, tokenizer, *cases).examples
    rows = [row for case in cases for row in Template(name, case, tokenizer).rows()]
    expected = [target for _, _, targets in rows for target in targets]
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_epoch(lengths, batch_size=1, max_length=sum(lengths), packing=True, shuffle=False, seed=0, epoch=0)
    assert plan == [[list(range(len(examples)))]]
    batch = collate([examples], pad_token_id=0, packing=True)
    assert batch.position_ids[0].tolist() == [place for length in lengths for place in range(length)]
    packed = Example(batch.input_ids[0].tolist(), batch.labels[0].tolist(), "")
    trained = [part for flag, part in runs(tokenizer, packed) if flag]
    if name == "llava_next":
        trained, expected = [part.rstrip() for part in trained], [part.rstrip() for part in expected]
    assert trained == expected


@pytest.fixture(scope="module")
def base(tokenizers, tmp_path_factory):
    """A model folder without weights: `preview` takes no more of it than this."""
    from transformers import LlamaConfig

    tokenizer = tokenizers("qwen2_5")
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_preview_shows_the_rows_that_are_trained(tmp_path, tokenizers, base, name):
    tokenizer = tokenizers(name)
    made = dataset(tmp_path, tokenizer, "two turns").examples
    data = {"train": str(tmp_path / "rows.jsonl"), "chat_template": str(FOLDER / f"{name}.jinja"),
            "packing": False, "shuffle": False, "max_length": 8192}  # fmt: skip
    if name == "glm4moe":
        stops = Path(tokenizer.name_or_path) / "generation_config.json"
        (base / "generation_config.json").write_text(stops.read_text())
    preview({"model": {"name_or_path": str(base)}, "data": data}, json=tmp_path / "preview.json")
    (base / "generation_config.json").unlink(missing_ok=True)
    rows = json.loads((tmp_path / "preview.json").read_text())["rows"]
    assert [(row["input_ids"], row["labels"]) for row in rows] == [(list(e.input_ids), list(e.labels)) for e in made]
    assert [row["text"] for row in rows] == [tokenizer.decode(example.input_ids) for example in made]
