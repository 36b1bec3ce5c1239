"""The configuration: its keys and defaults, and what is said of every kind of mistake in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

from qlora_tool.config import (
    SECTIONS,
    AdapterConfig,
    Config,
    Mark,
    choices,
    config_schema,
    config_to_yaml,
    differences,
    load_config,
    marked,
    memory_settings,
    parse_size,
    with_values,
)
from qlora_tool.config.keys import AdapterKeys, adapter_config
from qlora_tool.config.recipes import recipe_names, recipes_folder
from qlora_tool.config.schema import choices_of, schemas_of
from qlora_tool.errors import UserError
from qlora_tool.methods import method_keys
from qlora_tool.methods.keys import MethodKeys, Share

# The documented keys, in their order, with their defaults.
DOCUMENTED = """
model: {name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct, revision: null, quantization: nf4, double_quant: true,
  embeddings: as_stored, compute_dtype: auto, device: auto, trust_remote_code: false, keep_quantized: false,
  weights: auto, resident_layers: 0, skip_modules: []}
adapter: {method: lora, r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear, exclude_modules: [],
  layers_to_transform: null, layers_pattern: [], modules_to_save: [], bias: none, rank_pattern: {}, alpha_pattern: {},
  init_from: null,
  use_rslora: false, init_lora_weights: default, loftq_iter: 1, calibration_rows: 256,
  target_parameters: [], trainable_token_indices: [],
  loraplus_lr_ratio: null,
  decompose_both: false, decompose_factor: -1, init_weights: default,
  projection_prng_key: 0, save_projection: true, d_initial: 0.1, adapter_len: 10, adapter_layers: null}
data: {train: data/train.jsonl, eval: null, format: auto, columns: {}, on_error: stop, train_on: completion,
  max_length: 2048, packing: true,
  padding_free: true, shuffle: true, chat_template: null, chat_template_kwargs: {},
  multi_turn: auto}
training: {output_dir: runs/my-model, num_train_epochs: auto, max_steps: -1, per_device_train_batch_size: 4,
  gradient_accumulation_steps: 1, group_by_length: false, learning_rate: 2.0e-4,
  lr_scheduler_type: cosine, warmup_steps: 0.03,
  weight_decay: 0.0, max_grad_norm: 1.0, label_smoothing_factor: 0.0, optim: adamw, optimizer_in_backward: false,
  gradient_checkpointing: auto,
  offload_boundaries: false, tiled_mlp: false, max_memory: null, seed: 0,
  full_determinism: false, logging_steps: 1, eval_steps: null,
  save_steps: 100, save_total_limit: 2, load_best_model_at_end: false, metric_for_best_model: loss,
  early_stopping_patience: null, eval_prompts: [], sharding: none, report_to: []}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write `c.yaml` into the current folder, a temporary one."""
    monkeypatch.chdir(tmp_path)

    def write(content: str) -> str:
        Path("c.yaml").write_text(content, encoding="utf-8")
        return "c.yaml"

    return write


def faults(source: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    return caught.value.lines


def test_keys_and_defaults_are_the_documented_ones():
    documented = yaml.safe_load(DOCUMENTED)
    written = yaml.safe_load(config_to_yaml(Config()))
    assert written == documented
    assert [*written] == [*documented]
    assert all([*written[section]] == [*documented[section]] for section in documented)


def test_values_of_a_file_and_overrides(write):
    path = write("adapter: {r: 8, target_modules: [q_proj, v_proj]}\ntraining:\n  learning_rate: 1.0e-3\n")
    config = load_config(path, ["training.learning_rate=2e-5", "data.eval=0.1", "adapter.target_modules=.*_proj"])
    assert (config.adapter.r, config.adapter.target_modules) == (8, ".*_proj")
    assert (config.training.learning_rate, config.data.eval) == (2e-5, 0.1)
    assert config.training.max_steps == -1
    assert config.adapter.model_fields_set == {"r", "target_modules"}


def test_overrides_reach_into_mappings_with_dotted_names(write):
    path = write("adapter:\n  rank_pattern: {q_proj: 4}\ndata:\n  eval: 0.5\n")
    config = load_config(path, ["adapter.rank_pattern.layers.0.v_proj=2", "data.eval.short=short.jsonl"])
    assert config.adapter.rank_pattern == {"q_proj": 4, "layers.0.v_proj": 2}
    assert config.data.eval == {"short": "short.jsonl"}


def test_three_mistakes_are_three_lines(write):
    path = write("training:\n  lerning_rate: 2e-4\n  max_steps: many\nadapter:\n  r: 0\n")
    assert faults(path) == [
        "c.yaml: adapter.r: expected a whole number of at least 1, found 0",
        "c.yaml: training.max_steps: expected a whole number of at least 1 or -1, found the text 'many'",
        "c.yaml: training.lerning_rate: unknown key; did you mean 'learning_rate'?",
    ]


def test_every_kind_of_mistake_is_reported_at_once(write):
    path = write(
        "model: {quantization: NF4}\n"
        "modle: {}\n"
        "adapter: []\n"
        "data:\n  format: text\n  train_on: completion\n"
        "training:\n  max_steps: 3\n  max_steps: 4\n  seed: 1\n"
    )
    lines = faults(path, "training.warmup_steps=-1", "optim", "data.train=[", "training.output_dr=x")
    assert lines == [
        "c.yaml, line 9: 'max_steps' stands twice; keep one",
        "c.yaml: modle: unknown key; did you mean 'model'?",
        "c.yaml: adapter: expected a mapping of keys, found an empty list",
        "--set optim: expected KEY=VALUE, such as --set training.max_steps=20",
        "--set data.train=[: not valid YAML: while parsing a flow node, expected the node content, "
        "but found '<stream end>'; put it in quotes",
        "c.yaml: model.quantization: expected one of nf4, fp4, int8, none, found 'NF4'; did you mean 'nf4'?",
        "--set training.warmup_steps: expected a number of at least 0 (below 1 a share, from 1 on a whole number), "
        "found -1",
        "--set training.output_dr: unknown key; did you mean 'output_dir'?",
        "c.yaml: data.train_on: completion cannot go with data.format text, which is trained on every token; "
        "leave it out or set all",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.lerning_rate", "did you mean 'learning_rate'?"),
        ("training.max_length", "did you mean 'data.max_length'?"),
        ("learning_rate", "did you mean 'training.learning_rate'?"),
        ("trainig.learning_rate", "did you mean 'training.learning_rate'?"),
        ("adapter.use_dorra", "did you mean 'use_dora'?"),
        ("xyz", "expected one of model, adapter, data, training"),
        ("data.xyz", "expected one of train, eval, format,"),
        ("training", "name one of its keys, such as training.output_dir"),
    ],
)
def test_a_key_that_does_not_exist_names_the_closest(write, key, hint):
    (line,) = faults(write("data: {}"), f"{key}=1")
    assert line.startswith(f"--set {key}: ")
    assert hint in line


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("adapter.r", ["0", "1.5", "true", "abc", "null", "[1]"], "a whole number of at least 1"),
        ("adapter.lora_dropout", ["1", "-0.1", ".nan", "false"], "a number of at least 0 and below 1"),
        ("adapter.lora_alpha", ["0", "x"], "a number above 0"),
        ("adapter.method", ["lorra", "3"], "one of lora, dora"),
        ("adapter.exclude_modules", ["null", "[1]", "'['"], "regular expression"),
        ("adapter.modules_to_save", ["lm_head", "[1]"], "a list of module names"),
        ("adapter.target_modules", ["[]", "{}", "'('", "''"], "regular expression"),
        ("adapter.rank_pattern", ["{q: 0}", "[q]", "{'(': 1}"], ""),
        ("data.max_length", ["0", "-1", "12.5"], "a whole number of at least 1"),
        ("data.eval", ["1.5", "0", "-0.1", "{}", "{a: 1}", "true"], "a fraction above 0 and below 1"),
        ("data.packing", ["1", "'yes'"], "true or false"),
        ("data.train", ["null", "5", "''"], "a file, a folder, a hub id or a list"),
        ("model.revision", ["2024", "2024-01-01"], "put it in quotes"),
        ("training.learning_rate", ["0", "-1e-4", ".inf", "2e"], "a number above 0"),
        ("training.max_steps", ["0", "-2"], "a whole number of at least 1 or -1"),
        ("training.warmup_steps", ["1.5", "-0.1"], "below 1 a share, from 1 on a whole number"),
        ("training.save_steps", ["-1", "0", "null"], "a whole number of at least 1"),
        ("training.eval_steps", ["0", "-5"], "a whole number of at least 1 or null"),
        ("training.optim", ["sgd", "AdamW"], "one of adamw, adamw_8bit, paged_adamw_8bit"),
        ("training.gradient_checkpointing", ["maybe", "1"], "one of auto, true, false"),
        ("training.max_memory", ["24X", "0", "-3", "1.5", "GB"], "a size such as 24GB"),
        ("training.report_to", ["tensorbord", "[wandbb]"], "one of tensorboard, wandb"),
    ],
)
def test_wrong_values_say_what_was_expected(write, key, bad, expected):
    path = write("data: {eval: 0.1}")
    for value in bad:
        (line,) = faults(path, f"{key}={value}")
        assert line.startswith(f"--set {key}: ")
        assert expected in line
        assert "found" in line


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("training.learning_rate=2e-4", 2e-4),  # text in YAML 1.1, as it has no dot
        ("training.max_steps='20'", 20),
        ("training.max_steps=20.0", 20),
        ("training.warmup_steps=0.1", 0.1),
        ("training.warmup_steps=5.0", 5),
        ("training.num_train_epochs=0.5", 0.5),
        ("training.max_memory=22GiB", "22GiB"),
        ("training.report_to=wandb", ["wandb"]),
        ("training.report_to=none", []),
        ("training.gradient_checkpointing=false", False),
        ("adapter.init_lora_weights=true", "default"),
        ("adapter.target_modules=[a]", ["a"]),
        ("adapter.exclude_modules=.*down_proj", ".*down_proj"),
        ("data.eval={one: 1.jsonl}", {"one": "1.jsonl"}),
        ("data.eval=2e-2", 0.02),
        ("data.train=~/t.jsonl", str(Path.home() / "t.jsonl")),
    ],
)
def test_right_values_in_all_their_spellings(write, assignment, value):
    section, key = assignment.partition("=")[0].split(".")
    read = getattr(getattr(load_config(write("data: {}"), [assignment]), section), key)
    assert read == value
    assert type(read) is type(value)


def test_names_that_other_tools_use(write):
    path = write("adapter: {use_dora: true, method: lora}\ntraining: {activation_checkpointing: true}\n")
    config = load_config(path)
    assert config.adapter.method == "dora"
    assert config.training.gradient_checkpointing is True
    assert load_config(write("adapter: {use_dora: false}")).adapter.method == "lora"


@pytest.mark.parametrize(
    ("content", "overrides", "start"),
    [
        ("adapter: {use_dora: false, method: dora}", [], "c.yaml: adapter.use_dora: false, but adapter.method"),
        ("adapter: {use_dora: 1}", [], "c.yaml: adapter.use_dora: expected true or false"),
        (
            "training: {activation_checkpointing: true, gradient_checkpointing: false}",
            [],
            "c.yaml: training.activation_checkpointing: true, but gradient_checkpointing, the same thing, is false",
        ),
        ("data: {train_on: completion}", ["data.format=text"], "c.yaml: data.train_on: completion cannot go with"),
        (
            "model: {weights: disk, quantization: none}\nadapter: {method: full}",
            [],
            "c.yaml: model.weights: disk, but method full trains the base's own weights, on the device; leave it out",
        ),
        ("model: {resident_layers: 2}", [], "c.yaml: model.resident_layers: 2, but model.weights: auto chooses it; le"),
        (
            "model: {resident_layers: 2}",
            ["model.weights=resident"],
            "c.yaml: model.resident_layers: 2, but model.weights: resident keeps all of them; leave it out, or set",
        ),
        ("training: {eval_steps: 5}", [], "c.yaml: training.eval_steps: 5, but there is nothing to evaluate"),
        (
            "adapter: {target_modules: [q_proj, lm_head], modules_to_save: [lm_head]}",
            [],
            "c.yaml: adapter.modules_to_save: 'lm_head' is in adapter.target_modules too",
        ),
        (
            "adapter: {modules_to_save: [norm, model.embed_tokens]}",
            ["model.embeddings=int8"],
            "--set model.embeddings: int8, but adapter.modules_to_save trains 'model.embed_tokens' in full; leave one",
        ),
    ],
)
def test_contradictions(write, content, overrides, start):
    (line,) = faults(write(content), *overrides)
    assert line.startswith(start)


def test_a_key_at_fault_causes_no_second_complaint(write):
    """With data.eval unreadable, nothing is said of eval_steps, which would be right with a readable one."""
    (line,) = faults(write("data: {eval: 7}\ntraining: {eval_steps: 5}"))
    assert line.startswith("c.yaml: data.eval: ")


def test_every_token_of_text_is_trained_unless_somebody_asked_for_less(write):
    assert load_config(write("data: {format: text}")).data.train_on == "all"
    assert "train_on" not in load_config(write("data: {format: messages}")).data.model_fields_set


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("model:\n  a: [1\ndata: {}\n", "c.yaml, line 3, column 5: not valid YAML: "),
        ("model:\n\tname: x\n", "c.yaml, line 2, column 1: not valid YAML: "),
        ("- a\n", "c.yaml: expected a mapping of sections (model, adapter, data, training), found a list"),
        ("", "c.yaml: expected a mapping of sections (model, adapter, data, training), found an empty file"),
        ("a: !!python/object/apply:os.getcwd []", "c.yaml, line 1, column 4: not valid YAML: could not determine"),
        ("a: \x00", "c.yaml: expected YAML in UTF-8: "),
    ],
)
def test_files_that_are_no_configuration(write, content, line):
    (found,) = faults(write(content))
    assert found.startswith(line)


def test_a_file_in_another_encoding(write):
    Path(write("")).write_bytes("data: {train: fran\xe7ais.jsonl}".encode("latin-1"))
    (line,) = faults("c.yaml")
    assert line.startswith("c.yaml: byte 18 (0xe7) is not UTF-8")


def test_a_source_that_is_neither_file_nor_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (line,) = faults("configs/dmeo.yaml")
    assert line.startswith("configs/dmeo.yaml: neither a file nor a recipe; did you mean 'd")
    assert line.endswith("did you mean 'demo'?")
    (line,) = faults(str(tmp_path))
    assert line.endswith("found a folder")


def test_a_folder_of_a_recipes_name_does_not_hide_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert load_config("demo").model.name_or_path == "demo"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_written_configuration_is_read_back_equal(write, recipe):
    config = load_config(recipe)
    assert load_config(write(config_to_yaml(config))) == config


def test_odd_values_survive_being_written(write):
    odd = {
        "model.revision": "0123456",
        "model.name_or_path": "été: #1",
        "training.learning_rate": 1e-7,
        "training.output_dir": "yes",
        "training.max_memory": 3 * 10**9,
        "data.eval": {"a b": "x: y.jsonl"},
        "adapter.target_modules": r".*\.(q|v)_proj",
        "adapter.alpha_pattern": {r"layers\.0": 0.5},
        "adapter.method": "dora",
    }
    config = with_values(Config(), odd)
    assert load_config(write(config_to_yaml(config))) == config


def test_with_values_checks_and_remembers_who_set_what():
    config = with_values(Config(), {"data.train_on": "all", "training.gradient_checkpointing": True})
    assert config.data.train_on == "all"
    assert config.data.model_fields_set == {"train_on"}
    assert config.model.model_fields_set == set()
    with pytest.raises(UserError, match=r"data\.max_length: expected a whole number"):
        with_values(config, {"data.max_length": 0})


def test_a_key_by_its_other_name_is_blamed_by_that_name(write):
    (line,) = faults(write("data: {}"), "training.activation_checkpointing=.nan")
    assert line == "--set training.activation_checkpointing: expected one of auto, true, false, found nan"
    (line,) = faults(write("training: {activation_checkpointing: 'true'}"))
    assert line.endswith("found 'true'; write it without quotes")


def test_every_entry_of_a_mapping_that_is_at_fault_is_named(write):
    (line,) = faults(write("adapter: {rank_pattern: {q: 0, '(': 4, v: 8, k: x}}"))
    assert line == (
        "c.yaml: adapter.rank_pattern: 'q': expected a whole number of at least 1, found 0; "
        "'(': expected a name or a regular expression, found the text '(' (missing ), unterminated subpattern at "
        "position 0); 'k': expected a whole number of at least 1, found the text 'x'"
    )


def test_a_key_that_is_no_text_is_unknown(write):
    assert faults(write("training: {5: 1}"))[0].startswith("c.yaml: training.5: unknown key")


def test_the_choices_of_a_key():
    assert choices("model.quantization") == ("nf4", "fp4", "int8", "none")
    assert choices("training.gradient_checkpointing") == ("auto", "true", "false")
    assert choices("adapter.method") == tuple(method_keys())
    with pytest.raises(KeyError, match="takes a whole number of at least 1"):
        choices("adapter.r")
    with pytest.raises(KeyError):
        choices("adapter.rr")


# ------------------------------------------------------------------------------------------- keys of the methods


class Small(MethodKeys):
    """Keys of a method."""

    rank_dropout: Share = 0.0
    """Dropout over ranks."""


class Smaller(Small):
    """A method that reads what `Small` does, and one key more."""

    not_read = frozenset({"bias"})
    start: Annotated[Literal["zero", "one"], Mark.NOT_IN_MEMORY] = "zero"
    """Where it starts."""


def test_the_section_adapter_has_the_keys_of_its_methods():
    section = adapter_config({"small": Small, "smaller": Smaller, "lora": MethodKeys})
    assert [*section.model_fields] == [*AdapterKeys.model_fields, "rank_dropout", "start"]
    assert section.model_fields["method"].description == AdapterKeys.model_fields["method"].description
    made = section.model_validate({"method": "smaller", "rank_dropout": "5e-1"})
    assert (made.of_method(Smaller).rank_dropout, made.of_method(Smaller).start, made.r) == (0.5, "zero", 16)
    for values in ({"method": "dora"}, {"rank_dropout": 1}, {"rank_dropuot": 0.1}):
        with pytest.raises(ValueError, match=next(iter(values))):
            section.model_validate(values)


@pytest.mark.parametrize(
    ("values", "unread"),
    [
        ({"method": "small", "rank_dropout": 0.5}, []),
        ({"method": "small", "start": "one"}, ["start"]),
        ({"method": "small", "start": "zero"}, []),  # written out, as a run's config.yaml has it
        ({"method": "smaller", "start": "one", "bias": "all"}, ["bias"]),
        ({"start": "one", "rank_dropout": 0.5, "bias": "all"}, ["rank_dropout", "start"]),
    ],
)
def test_keys_that_the_chosen_method_does_not_read(values, unread):
    section = adapter_config({"small": Small, "smaller": Smaller, "lora": MethodKeys})
    assert section.model_validate(values).unread() == unread


def test_two_methods_with_one_key_share_its_class():
    class Other(MethodKeys):
        rank_dropout: Share = 0.5

    class Own(MethodKeys):
        r: int = 3

    with pytest.raises(TypeError, match=r"Other\.rank_dropout: Small has a key of this name"):
        adapter_config({"lora": Small, "other": Other})
    with pytest.raises(TypeError, match=r"Own\.r: AdapterKeys has a key of this name"):
        adapter_config({"lora": Own})


def test_a_key_that_the_method_does_not_read_is_a_fault(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AdapterConfig, "methods", {**AdapterConfig.methods, "dora": MethodKeys})
    path = write("adapter: {use_rslora: true, init_lora_weights: default}")
    assert load_config(path).adapter.unread() == []
    assert faults(path, "adapter.method=dora") == [
        "c.yaml: adapter.use_rslora: true, but method dora does not read it; leave it out"
    ]


# ------------------------------------------------------------------------------- what configurations are compared by


def test_the_keys_that_the_memory_of_a_step_depends_on():
    """Each by whether a tensor of the step does; a batch's shape is known beside them."""
    assert set(memory_settings(Config())) == {
        *(f"model.{key}" for key in SECTIONS["model"].model_fields),
        *(f"adapter.{key}" for key in SECTIONS["adapter"].model_fields
          if key not in ("loraplus_lr_ratio", "calibration_rows")),
        *(f"training.{key}" for key in (
            "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "label_smoothing_factor", "optim",
            "optimizer_in_backward", "gradient_checkpointing", "offload_boundaries", "tiled_mlp", "sharding",
            "full_determinism",
        )),
    }  # fmt: skip
    assert memory_settings(with_values(Config(), {"adapter.r": 8}))["adapter.r"] == 8
    json.dumps(memory_settings(Config()))


def test_the_keys_that_may_differ_when_a_run_is_resumed():
    assert marked(Mark.FREE_ON_RESUME) == {
        "model.keep_quantized", "model.weights", "model.resident_layers", "training.gradient_checkpointing",
        "training.offload_boundaries",
        *(f"training.{key}" for key in (
            "output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "max_memory", "sharding",
                "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience", "eval_prompts",
        )),
    }  # fmt: skip


def test_what_differs_between_two_configurations():
    other = with_values(Config(), {"adapter.lora_alpha": 32.0, "data.eval": {"a": "b"}, "training.seed": 3})
    assert differences(Config(), other) == {"data.eval": (None, {"a": "b"}), "training.seed": (0, 3)}


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().training.seed = 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24_000_000_000),
        ("22GiB", 22 * 2**30),
        ("512MB", 512_000_000),
        ("800MiB", 800 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("12345", 12345),
        ("7B", 7),
        (12345, 12345),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 GBs", "-1GB", "0", "24G", "1e9", 0, -5, True, None, 1.5])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="expected a size such as 24GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5", "5GB"), (12, "12GB"), (999, "999GB"), ("1.5", "1.5GB"), ("24G", "24GB"), ("24 gi", "24GiB"),
        ("512m", "512MB"), ("5 giga", "5GB"), ("24 gibibytes", "24GiB"),
    ],
)  # fmt: skip
def test_a_size_without_its_unit_gets_it(written, meant):
    with pytest.raises(UserError, match=rf"; did you mean {meant}\?$"):
        parse_size(written)
    with pytest.raises(UserError, match=rf"--set training.max_memory: expected a size .*; did you mean {meant}\?$"):
        load_config("demo", {"training.max_memory": written})


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.eval=5%", "0.05"), ("data.eval=5", "0.05"), ("data.eval=2.5 %", "0.025"),
        ("adapter.lora_dropout=10%", "0.1"), ("adapter.lora_dropout=10", "0.1"), ("training.warmup_steps=3%", "0.03"),
    ],
)  # fmt: skip
def test_a_share_in_percent_gets_the_share(override, meant):
    with pytest.raises(UserError, match=rf"; did you mean {meant}\?$"):
        load_config("demo", [override])


@pytest.mark.parametrize(
    ("override", "meant"),
    [("model.device=gpu", "cuda"), ("model.compute_dtype=fp16", "float16"), ("model.quantization=4bit", "nf4"),
     ("training.optim=adamw-8bit", "adamw_8bit"), ("data.multi_turn=One-Per-Answer", "one_per_answer")],
)  # fmt: skip
def test_a_choice_in_another_spelling_gets_ours(override, meant):
    with pytest.raises(UserError, match=rf"; did you mean '{meant}'\?$"):
        load_config("demo", [override])


def test_the_shipped_schema_is_the_models():
    """Where this fails: `qlora-tool recipes schema > configs/config.schema.json`."""
    shipped = json.loads((recipes_folder() / "config.schema.json").read_text(encoding="utf-8"))
    assert shipped == config_schema()


def test_the_schema_lists_every_key_and_forbids_others():
    definitions = config_schema()["$defs"]
    for section in SECTIONS.values():
        schema = definitions[section.__name__]
        other_names = {"use_dora", "activation_checkpointing"}
        assert set(schema["properties"]) - other_names == set(section.model_fields)
        assert schema["additionalProperties"] is False
        assert all("description" in key for key in schema["properties"].values())


def _numbers() -> list[str]:
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key, field in section.model_fields.items()
            if isinstance(field.default, int | float) and not isinstance(field.default, bool)]  # fmt: skip


@pytest.mark.parametrize("value", ["9" * 20, "9" * 400, "9" * 3000, "9" * 5000, ".nan", ".inf", "1e400", "-1e400"])
def test_every_number_has_an_end(value):
    """No key takes what no run can have, or fails of it: it is refused, in a line of its own."""
    keys = _numbers()
    assert {"adapter.r", "training.seed", "training.learning_rate"} <= set(keys)
    for key in keys:
        try:
            config = load_config({}, [f"{key}={value}"])
        except UserError as error:
            assert len(error.lines) == 1 and key in error.lines[0]
            continue
        section, name = key.split(".")
        assert type(getattr(config, section)).model_fields[name].annotation is float, key  # a rate may be large
        assert isinstance(getattr(getattr(config, section), name), float), key  # but no integer of more than 64 bits


def test_every_number_of_the_schema_has_a_largest_value():
    """In lists, mappings and choices, too."""
    left, found = [("", config_schema())], []
    while left:
        path, schema = left.pop()
        if isinstance(schema, list):
            left += [(path, part) for part in schema]
        elif isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                found.append(path)
                assert {"maximum", "exclusiveMaximum", "enum", "const"} & schema.keys(), f"{path} has no largest value"
            left += [(f"{path}.{key}" if key not in ("properties", "anyOf") else path, part)
                     for key, part in schema.items() if key not in ("default", "description")]  # fmt: skip
    assert len(found) > 30


def test_a_number_that_is_too_large_is_told_the_largest():
    with pytest.raises(UserError, match=r"adapter\.r: .*, found 1000000000; 65536 at most"):
        load_config({}, ["adapter.r=1000000000"])


@pytest.mark.parametrize("setting", ["training.seed=18446744073709551615", "training.max_steps=-1", "adapter.r=65536",
                                     "training.max_steps=1_000", "training.max_grad_norm=1e30"])  # fmt: skip
def test_large_numbers_that_are_meant_are_taken(setting):
    load_config({}, [setting])


@pytest.mark.parametrize("setting", [
    "adapter.r=1000000000", "adapter.init_lora_weights=pissa_niter_99999999999",
    "data.train=[{path: a.jsonl, rows: 100000000000}]", "data.train=[{path: a.jsonl, repeat: 1000000000000}]",
    "data.train=[{path: a.jsonl, weight: .inf}]", "data.train=[{path: a.jsonl, weight: .nan}]",
    "training.max_steps=3000000000", "training.max_steps=1__0_", "adapter.rank_pattern={q_proj: 1000000}",
])  # fmt: skip
def test_what_would_never_end_is_refused(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        load_config({}, [setting])


def test_many_unknown_keys_are_refused_at_once():
    """The closest known key is looked for of the first ones alone, 5,000 would take a second and more; the others are
    counted."""
    for content in ({"training": {f"lerning_rate_{number}": 1 for number in range(5000)}},
                    {f"trainin{number}": 1 for number in range(5000)}):  # fmt: skip
        with pytest.raises(UserError) as error:
            load_config(content)
        assert len(error.value.lines) == 101 and error.value.lines[-1] == "configuration: 4,900 more faults"
        assert sum("did you mean" in line for line in error.value.lines) == 20


def test_what_was_given_is_never_suggested():
    """Of every key that has choices: a wrong list of one of them, and a choice in capitals."""
    with pytest.raises(UserError) as error:
        load_config({}, ["training.report_to=[none, wandb]"])
    assert "none stands alone" in str(error.value) and "did you mean" not in str(error.value)
    for name, section in SECTIONS.items():
        for key in section.model_fields:
            listed = choices_of(schemas_of(section)[key]) or ()
            for choice in listed:
                for value in ([choice, "x"], choice.upper() if isinstance(choice, str) else "x"):
                    try:
                        load_config({name: {key: value}})
                    except UserError as error:
                        assert f"found '{choice}'; did you mean '{choice}'" not in str(error)
