"""Where the measurements call into the inside of qlora_tool: its data, a training of its own, its predictions."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qlora_tool.config import Config
from qlora_tool.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_tool.data.batches import Batch
    from qlora_tool.data.tokenize import Dataset, Example
    from qlora_tool.memory.breakdown import Breakdown
    from qlora_tool.training.run_data import RunData

# ------------------------------------------------------------------------------------------------- model, data, batches


def model_folder(config: Config) -> Path:
    """Where the model's files lie."""
    from qlora_tool.model.source import resolve

    return resolve(config.model.name_or_path, config.model.revision)


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """What the configuration's `auto` means on this machine."""
    from qlora_tool.model.devices import choose_device
    from qlora_tool.model.open import choose_dtype

    device = choose_device(config.model.device)
    return device, choose_dtype(config.model.compute_dtype, device)


def require_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        MachineError: PyTorch sees no CUDA device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch sees no CUDA device here; run this on a machine that has one")


def vocabulary_size(config: Config) -> int:
    from qlora_tool.model.source import read_model_config

    return read_model_config(model_folder(config), False).get_text_config().vocab_size


def behaviour_in(file: Path) -> tuple[str, bool]:
    """How a run of this configuration lays its examples out: `packed` (attention by segment), `masks` or `padded`; and
    whether its model draws random numbers in training."""
    from qlora_tool.build.setup import Setup
    from qlora_tool.config import load_config
    from qlora_tool.model.behaviour import behaviour_of

    setup = Setup.of(load_config(file))
    found = behaviour_of(setup.model_config)
    packed = "packed" if found.keeps_apart == "segments" else "masks"
    return packed if setup.config.data.packing else "padded", found.draws


def train_alone(config: Mapping[str, Any]) -> None:
    """What `qlora-tool train` does but for predicting and watching memory."""
    from qlora_tool.config import load_config
    from qlora_tool.training.loop import train

    train(load_config(config))


def read_data(config: Config) -> RunData:
    """The tokenized rows of `data.train` and `data.eval`."""
    from qlora_tool.build.setup import Setup
    from qlora_tool.training.prepare import prepare_data

    return prepare_data(Setup.of(config))[0]


def read_rows(file: str, folder: Path, key: str = "--train") -> Dataset:
    """The tokenized rows of one file, of at most 512 tokens each; errors call it `key`."""
    from qlora_tool.config import DataConfig
    from qlora_tool.data.tokenize import build_dataset
    from qlora_tool.model.open import open_tokenizer

    return build_dataset(file, DataConfig(max_length=512), open_tokenizer(folder), key=key)


def padded_batch(examples: Sequence[Example], pad_token_id: int = 0) -> Batch:
    """One example a row."""
    from qlora_tool.data.batches import collate

    return collate([[example] for example in examples], pad_token_id=pad_token_id, packing=False)


def packed_batches(data: RunData, config: Config, size: int, count: int) -> tuple[list[Batch], float]:
    """The first batches of an epoch of packed rows, as `qlora-tool train` plans it, and how full its rows are."""
    from qlora_tool.data.batches import collate, plan_epoch

    length, lengths = config.data.max_length, data.train.lengths
    plan = plan_epoch(lengths, batch_size=size, max_length=length, packing=True, shuffle=True,
                      seed=config.training.seed, epoch=0)  # fmt: skip
    examples, pad = data.train.examples, data.pad_token_id
    batches = [
        collate([[examples[index] for index in row] for row in rows], pad_token_id=pad, packing=True)
        for rows in plan[:count]
    ]
    return batches, sum(lengths) / (length * sum(map(len, plan)))


def batch_of_tokens(rows: Sequence[list[int]]) -> Batch:
    """Full rows of one length, every token trained."""
    from qlora_tool.data.tokenize import Example

    return padded_batch([Example(ids, ids, f"row {number}") for number, ids in enumerate(rows, 1)])


def random_tokens(rows: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Rows of random tokens, the same ones for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(rows)]


def random_row(length: int, vocabulary: int) -> Batch:
    """A batch of one row."""
    return batch_of_tokens(random_tokens(1, length, vocabulary, seed=length))


def every_position_in_the_loss(batch: Batch) -> Batch:
    """The same batch with a loss at every position but each row's last, whatever its label: what not dropping ignored
    rows costs. Its loss is another one, of no use but to be timed."""
    import torch

    rows, length = batch.input_ids.shape
    places = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    targets = batch.input_ids[:, 1:].flatten()
    return replace(batch, predicting=places, targets=targets, trained_tokens=len(places))


# ----------------------------------------------------------------------------------------------------------- a training


class OurSide:
    """qlora-tool, by the functions that `qlora-tool train` runs, a step at a time.

    Args:
        config: of the run; `auto` settings are decided for `largest`.
        largest: the largest batch that will come.
    """

    def __init__(self, config: Config, largest: Batch):
        from qlora_tool.build.resolve import packs_apart
        from qlora_tool.build.setup import Setup
        from qlora_tool.memory.plan.budget import choose_for_run
        from qlora_tool.memory.trace.predict import BatchShape
        from qlora_tool.training.optimizers import make_optimizer, parameter_groups
        from qlora_tool.training.step import StepSettings

        setup = Setup.of(config)
        self.config = setup.config
        choice = choose_for_run(setup, BatchShape.of(largest))
        self.predicted_bytes = choice.predicted.peak_bytes if choice else None
        built = setup.build(recomputation=choice and choice.recomputation)
        self.model, self.adapters = built.model, built.adapters
        self.packs = packs_apart(setup.config, setup.model_config)
        training = self.config.training
        self.optimizer = make_optimizer(training, parameter_groups(self.adapters))
        self.settings = StepSettings.of(training)
        self.device = self.model.device

    def facts(self) -> dict[str, Any]:
        """What was decided for the run: the whole configuration, and what is recomputed in backward."""
        return {
            "config": self.config.model_dump(mode="json"),
            "recomputation": str(self.model.recomputation),
            "recomputed_share": recomputed_share(self.model),
            "predicted_bytes": self.predicted_bytes,
        }

    def step(self, batch: Batch, rate: float | None = None) -> float:
        """An optimizer step; the loss before it, the mean over the batch's trained tokens.

        Args:
            rate: learning rate; the configuration's by default. At 0 no weight changes.
        """
        from qlora_tool.training.step import no_phases

        return self._step(batch, no_phases, rate)

    def _step(self, batch: Batch, during: Any, rate: float | None = None) -> float:
        from qlora_tool.training.step import train_step

        rate = self.config.training.learning_rate if rate is None else rate
        return float(train_step(self.model, self.optimizer, [batch], self.settings, rate, during).loss)

    def loss_sum(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's trained tokens."""
        return self.model.loss_sum(batch)

    def step_with_digest(self, batch: Batch, rate: float | None = None) -> tuple[float, str]:
        """A step's loss, and a digest of all gradients that its backward pass gave, bit for bit.

        Args:
            rate: learning rate; the configuration's by default. At 0 no weight changes.
        """
        import torch

        from qlora_tool.training.step import no_phases

        digest = hashlib.sha256()

        def during(phase: str) -> AbstractContextManager:
            if phase == "optimizer":
                for gradient in self.optimizer.gradients():
                    digest.update(gradient.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
            return no_phases(phase)

        return self._step(batch, during, rate), digest.hexdigest()

    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        return self.adapters.parameters()

    def streamed_bytes(self) -> int:
        """What the base's weights have been read so far, of a model that streams them; else 0."""
        from qlora_tool.weights.streamed import StreamedHandle

        handles = (module for module in self.model.module.modules() if isinstance(module, StreamedHandle))
        return next((handle._stream.read_bytes for handle in handles), 0)

    def save(self, folder: str | Path) -> None:
        """Write the adapter as it is now, in PEFT's form."""
        from qlora_tool.adapters.peft_files import save_adapter

        name = self.config.model.name_or_path
        save_adapter(Path(folder), self.adapters, self.config.adapter, self.model.module, name, None)

    def categories(self, batch: Batch) -> dict[str, Any] | None:
        """The memory of one step by category, as `qlora-tool train` writes it into `memory.json`; None on CUDA."""
        from qlora_tool.memory.run_report import RunMemory

        with tempfile.TemporaryDirectory() as folder:
            run = SimpleNamespace(model=self.model, adapters=self.adapters, optimizer=self.optimizer,
                                  progress=SimpleNamespace(step=1), config=self.config,
                                  folder=SimpleNamespace(path=Path(folder)))  # fmt: skip
            with RunMemory().watch(run) as during:
                self._step(batch, during)
            return json.loads((Path(folder) / "memory.json").read_text(encoding="utf-8"))["measured"]


def error_of_products(config: Config, rows: int) -> float:
    """How far the outputs of adapted modules are from those of the 16-bit model, before the first step: ‖y − y₁₆‖ /
    ‖y₁₆‖ on the inputs that they get there, of the first evaluation rows; the mean over the modules."""
    import torch

    from qlora_tool.build.build import Start
    from qlora_tool.build.open import open_model
    from qlora_tool.build.setup import Setup
    from qlora_tool.training.prepare import prepare_data

    data, setup = prepare_data(Setup.of(config))
    built = setup.build(start=Start(data.train.examples))
    started = built.model.module.train(False)
    plain = open_model(config.model.model_copy(update={"quantization": "none"}))
    errors: list[float] = []

    def compare(module: torch.nn.Module, inputs: tuple[Tensor, ...], y: Tensor, name: str) -> None:
        difference = started.get_submodule(name)(inputs[0]).float() - y.float()
        errors.append(float(difference.norm() / y.float().norm()))

    for name in built.adapters.layers:
        plain.module.get_submodule(name).register_forward_hook(functools.partial(compare, name=name))
    evaluated = next(iter(data.evaluations.values())).examples
    examples = [evaluated[index] for index in range(min(rows, len(evaluated)))]
    with torch.no_grad():
        for example in examples:  # one by one: no padding takes part
            plain.hidden_states(padded_batch([example]).to(plain.device))
    return sum(errors) / len(errors)


class PlainSide(OurSide):
    """The same without the fused LoRA operations."""

    def __init__(self, config: Config, largest: Batch):
        from qlora_tool.methods.lora import Lora

        Lora.fused = False  # for all of this process
        super().__init__(config, largest)


def recomputed_share(model: Any) -> float:
    """Of the products with frozen weights inside the decoder layers, the share that is computed again in backward."""
    from qlora_tool.model.checkpointing import decoder_layers
    from qlora_tool.weights.modules import FrozenLinear

    total = recomputed = 0
    for layer, parts in zip(decoder_layers(model.module).values(), model.recomputation.layers, strict=True):
        for name, module in layer.named_modules():
            if isinstance(module, FrozenLinear):
                work = module.in_features * module.out_features
                total += work
                recomputed += work * any(part == "" or f"{name}.".startswith(f"{part}.") for part in parts)
    return recomputed / total if total else 0.0


# ---------------------------------------------------------------------------------------------------- memory of a step


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step, of a model that is known by its configuration alone (its weights are random).

    Attributes:
        model_config: transformers' configuration; what runs may change it, so give each a fresh one.
        trained: tokens that have a label; by default all but the first of each row.
        examples: of one row, by their lengths, where the row is packed.
    """

    config: Config
    model_config: Any
    rows: int
    length: int
    dtype: torch.dtype
    trained: int | None = None
    padded: bool = False
    examples: tuple[int, ...] | None = None

    def ready(self, device: str, keeps_weights: bool = False) -> Callable[[], Any]:
        """Load the model on a device; what takes a step there and gives its loss as a tensor.

        With `keeps_weights` everything is recomputed, and weights are kept from then until their gradients' products.
        """
        import torch

        from qlora_tool.build.build import build
        from qlora_tool.build.tensors import Random
        from qlora_tool.ops.determinism import full_determinism
        from qlora_tool.training.optimizers import make_optimizer, parameter_groups
        from qlora_tool.training.step import StepSettings, train_step

        config, model_config, shape, dtype = self._arguments()
        built = build(config, model_config, Random(), device=torch.device(device), compute_dtype=dtype,
                      recomputation=self._keeping() if keeps_weights else None)  # fmt: skip
        optimizer = make_optimizer(config.training, parameter_groups(built.adapters))
        batch, settings = shape.batch().to(device), StepSettings.of(config.training)

        def step() -> Any:
            with full_determinism(config.training.full_determinism):
                return train_step(built.model, optimizer, [batch], settings, 1e-4).loss

        return step

    def _keeping(self) -> Any:
        from qlora_tool.model.checkpointing import ALL_RECOMPUTED, Recomputation

        return Recomputation.uniform(ALL_RECOMPUTED, self.model_config.num_hidden_layers, keeps_weights=True)

    def _arguments(self) -> tuple[Any, ...]:
        from qlora_tool.memory.trace.predict import BatchShape

        trained = self.trained or self.rows * (self.length - 1)
        shape = BatchShape(self.rows, self.length, trained, self.padded, self.examples)
        return self.config, self.model_config, shape, self.dtype

    def predicted(self) -> Breakdown:
        from qlora_tool.memory.trace.classify import timeline
        from qlora_tool.memory.trace.predict import predict

        return timeline(predict(*self._arguments())).breakdown()

    def measured_peak(self) -> int:
        """Bytes, by the profiler's count of the allocator, with nothing else near the step."""
        from qlora_tool.memory.trace.measure import measure_peak

        return measure_peak(*self._arguments())

    def traced(self) -> Breakdown:
        """Of the real step under the tracer."""
        from qlora_tool.memory.trace.classify import timeline
        from qlora_tool.memory.trace.measure import measure_categories

        return timeline(measure_categories(*self._arguments())).breakdown()

    def predicted_on_cuda(self, device: dict[str, Any], expandable_segments: bool) -> Any:
        """The timeline on a device as `look_at_cuda` describes it."""
        from qlora_tool.memory.allocator.calibrate import Calibration
        from qlora_tool.memory.allocator.timeline import cuda_timeline
        from qlora_tool.memory.trace.predict import predict
        from qlora_tool.ops.declare import Target

        return cuda_timeline(
            predict(*self._arguments(), target=Target("cuda", tuple(device["capability"]))),
            expandable_segments=expandable_segments,
            compute_capability=tuple(device["capability"]),
            calibration=Calibration(**device["calibration"]) if device.get("calibration") else None,
            multiprocessors=device.get("multiprocessors"),
        )

    def watched_without_data(self, watch: Any, capability: tuple[int, int], keeps_weights: bool = False) -> None:
        """Run the steps on fake tensors, meant for a card; `watch`, a `Watch` and a dispatch mode, sees all of it.

        With `keeps_weights` everything is recomputed, and weights are kept from then until their gradients' products.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        from qlora_tool.memory.trace.predict import trial_run
        from qlora_tool.model.experts import assuming_routing, even_shares
        from qlora_tool.ops.declare import Target, meant_for

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, meant_for(Target("cuda", capability)), assuming_routing(even_shares), watch:
            trial_run(*self._arguments(), self._keeping() if keeps_weights else None, watch=watch)

    def measured_on_cuda(self) -> Any:
        """The breakdown and the allocator's history of a step on the device."""
        from qlora_tool.memory.trace.measure_cuda import measure_on_cuda

        return measure_on_cuda(*self._arguments())


KERNELS = ("norm", "rotary", "gated", "dequantization", "adamw")


def leave_out_kernels(names: Sequence[str]) -> None:
    """Let these operations run by their references on a card, in models that are made from now on, in this process."""
    from types import SimpleNamespace

    from qlora_tool.model import fused_modules
    from qlora_tool.ops import adamw, gated, quantization

    def no(_: Any) -> Any:
        return None

    places = {"norm": (fused_modules, "norm_of"), "rotary": (fused_modules, "rotation_in"),
              "gated": (gated, "in_one_pass"), "adamw": (adamw, "usable")}  # fmt: skip
    for name in names:
        if name == "dequantization":
            quantization.kernels = SimpleNamespace(usable=no, available=no)
        else:
            place, attribute = places[name]
            assert hasattr(place, attribute)  # or nothing would be left out
            setattr(place, attribute, no)


def predicted_phases(config: Config, rows: int, length: int) -> dict[str, int]:
    """The most bytes of each phase of a run on full rows, predicted without weights."""
    from qlora_tool.model.source import read_model_config

    model_config = read_model_config(model_folder(config), False)
    return StepMemory(config, model_config, rows, length, device_and_dtype(config)[1]).predicted().phase_peak_bytes


def largest_of_a_step(phases: dict[str, int]) -> int:
    """The most bytes of a step: what loading took is left out, as a count of a step does."""
    return max(size for phase, size in phases.items() if phase != "load")


def tokens_per_expert(shares: Callable[[int, int], Sequence[int]]) -> AbstractContextManager[None]:
    """Meanwhile `shares(tokens x k, experts)` decides how many tokens each expert gets, whatever the router said.

    Tokens then go to experts they were not meant for; the sizes are right, and nothing else is asked of them.
    """
    from qlora_tool.model.experts import assuming_routing

    return assuming_routing(shares)


def look_at_cuda() -> dict[str, Any]:
    """The CUDA device, measured once."""
    from dataclasses import asdict

    import torch

    from qlora_tool.memory.allocator.calibrate import calibrate

    calibration = calibrate()
    return {
        "name": calibration.device_name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "total_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "calibration": asdict(calibration),
    }


def allocations(profiler: Any) -> list[tuple[int, int]]:
    """(time, bytes) of each allocation (positive) and free (negative) that torch's profiler recorded, in order."""
    from qlora_tool.memory.trace.measure import allocations as recorded

    return sorted(recorded(profiler))
