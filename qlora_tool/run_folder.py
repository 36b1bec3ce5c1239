"""What a run leaves behind: the layout of its folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_tool.config import Config, config_to_yaml, load_config
from qlora_tool.files.atomic import disk_errors, write_text


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run's folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def holds_run(self) -> bool:
        return self.config_file.exists()

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run's."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def config(self) -> Config:
        return load_config(str(self.config_file))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.checkpoints.glob("step-*") if (path / "state.json").exists()]
        return sorted(found, key=_order)

    def is_finished(self) -> bool:
        return (self.adapter / "adapter_config.json").exists()

    def write_config(self, config: Config) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, config_to_yaml(config))

    def clear(self) -> None:
        """Remove an earlier run's files, and nothing else that lies in the folder."""
        shutil.rmtree(self.adapter, ignore_errors=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in ("config.yaml", "metrics.jsonl", "memory.json"):
            (self.path / name).unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Go back to `step`: drop what was logged and saved after it, which a resumed run makes again."""
        shutil.rmtree(self.adapter, ignore_errors=True)
        for path in self.checkpoints.glob("step-*"):
            if _order(path) > _order(self.checkpoint(step)):
                shutil.rmtree(path)
        for path in self.checkpoints.glob(".step-*"):  # left behind where the process was killed
            shutil.rmtree(path)
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
            write_text(self.metrics_file, "".join(f"{line}\n" for line in lines if _logged_step(line) <= step))


def _order(checkpoint: Path) -> tuple[int, str]:
    """By step: names grow a digit at a million."""
    return len(checkpoint.name), checkpoint.name


def _logged_step(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity for half a line, which a power failure leaves."""
    try:
        step: float = json.loads(line)["step"]
        return step
    except (ValueError, KeyError, TypeError):
        return float("inf")
