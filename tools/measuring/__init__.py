"""Measure what the documents promise.

The exit code is 1 where a limit is missed. `--json FILE` keeps the figures with the machine they come from. Let nothing
else run meanwhile. The times are of two cores and, but for a 7B, of SmolLM2-135M; MB are 10^6 bytes. `tools/make
random-model FOLDER --shape llama-2-7b` makes the 7B.
"""

SUBJECTS = (
    "benchmark", "peft", "prediction", "long-context", "load", "training-memory", "streamed", "streamed-card", "export",
    "export-stream", "exact-match", "memory-cuda", "step-profile", "step-count", "kernels", "longest", "cuda",
    "families", "starts", "methods", "grids", "few-bits", "gguf-stream", "torture", "pages", "answers",
)  # fmt: skip
