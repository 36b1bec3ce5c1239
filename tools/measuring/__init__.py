"""Measure what the documents promise, each subject in a module of its own.

The exit code is 1 where what is asked for is missed. `--json FILE` keeps the figures with the machine they come from. Let
nothing else run meanwhile. Times are those of two cores; MB are 10^6 bytes. `tools/make random-model FOLDER --shape
llama-2-7b` makes the 7B that some are meant for.
"""

SUBJECTS = (
    "benchmark", "peft", "prediction", "long-context", "load", "training-memory", "export", "export-stream",
    "exact-match", "memory-cuda", "longest", "cuda",
)  # fmt: skip
