"""The configuration of a run: typed, checked as a whole, read from YAML and written back with every default resolved.

    config = load_config("llama.yaml", ["training.max_steps=20"])
    config.model.name_or_path, config.training.learning_rate

Keys take PEFT's and transformers' names wherever those have one. Paths are relative to the current folder, not to the
configuration's. `config.data.model_fields_set` names the keys that somebody set, as against those left at their
defaults. This package imports neither torch nor transformers.
"""

from qlora_tool.config.compare import differences, marked, memory_settings
from qlora_tool.config.contradictions import evaluation_losses
from qlora_tool.config.keys import (
    SECTIONS,
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    choices,
    config_schema,
)
from qlora_tool.config.reading import config_to_yaml, load_config, with_values
from qlora_tool.config.types import parse_size
from qlora_tool.methods.keys import Mark

__all__ = [
    "SECTIONS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "Mark",
    "ModelConfig",
    "TrainingConfig",
    "choices",
    "config_schema",
    "config_to_yaml",
    "differences",
    "evaluation_losses",
    "load_config",
    "marked",
    "memory_settings",
    "parse_size",
    "with_values",
]
