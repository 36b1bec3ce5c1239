"""What a run leaves behind: the layout of its folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_tool.config import Config, config_to_yaml, load_config
from qlora_tool.files import disk_errors, write_text

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

    def config(self) -> Config:
        return load_config(str(self.config_file))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if (path / "state.json").exists())

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

    def keep_metrics_until(self, step: int) -> None:
        """Drop the logged steps after `step`, which a resumed run logs again."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(self.metrics_file, "".join(f"{line}\n" for line in kept))
