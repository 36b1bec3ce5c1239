"""The tokenized data of a run, checked against the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tool.config import Config
from qlora_tool.data.tokenize import Dataset, build_dataset, build_evaluation_sets
from qlora_tool.errors import UserError
from qlora_tool.inference.ends import generation_settings
from qlora_tool.model.open import check_length, open_tokenizer
from qlora_tool.model.resized import rows_in_files
from qlora_tool.model.tokenizer_check import check_on_data
from qlora_tool.model.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RunData:
    """The tokenized data of a run, the tokenizer, and the folder that it was opened from."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluations: dict[str, Dataset]
    tokenizer_folder: Path

    @property
    def pad_token_id(self) -> int:
        """What fills short rows up. It is masked out and never has a label, so any token does."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return candidate
        return 0


def read_run_data(config: Config, folder: Path, model_config: Any, *, first: int | None = None) -> RunData:
    """The tokenized data of a run.

    Args:
        folder: the model's, which has the tokenizer.
        model_config: the model's transformers configuration; None where there is none to check the data against.
        first: read no more rows of a source than this.

    Raises:
        UserError: the data, the tokenizer or generation_config.json is at fault, or they do not fit the model.
        MachineError: the hub cannot be reached.
    """
    if model_config is not None:
        check_length(model_config, config.data.max_length)
    opened = _tokenizer_folder(config, folder, model_config)
    tokenizer = open_tokenizer(opened, config.model.trust_remote_code)
    generation_settings(folder)  # an export needs them: a broken file is told now, not after the last step
    seed = config.training.seed
    train = build_dataset(config.data.train, config.data, tokenizer, first=first, seed=seed)
    check_on_data(tokenizer, opened, config.data.train)
    train, evaluations = build_evaluation_sets(config.data, tokenizer, train, first=first, seed=seed)
    data = RunData(tokenizer, train, evaluations, opened)
    if model_config is not None:
        _refuse_foreign_tokens(data, opened, model_config.get_text_config().vocab_size)
    return data


def _tokenizer_folder(config: Config, folder: Path, model_config: Any) -> Path:
    """The model's folder; that of an adapter to start from, where its vocabulary was resized and it brings its own."""
    start = config.adapter.init_from
    own = start and rows_in_files(model_config) is not None and has_tokenizer(Path(start))
    return Path(start) if start and own else folder


def _refuse_foreign_tokens(data: RunData, folder: Path, vocabulary: int) -> None:
    datasets = (data.train, *data.evaluations.values())
    highest = max(dataset.highest_token for dataset in datasets)
    if highest >= vocabulary:
        raise UserError(
            f"{folder}: its tokenizer gives token {highest}, but the model's vocabulary has {vocabulary} tokens; "
            "use the tokenizer files that came with the model"
        )
