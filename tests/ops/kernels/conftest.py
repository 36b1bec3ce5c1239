"""Kernels on CPU tensors, and compiled without a card; their tests skip where there is no Triton, which comes with
PyTorch for CUDA on Linux."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.fixture
def interpreted(monkeypatch):
    """A module of kernels whose kernels run in Triton's interpreter, on CPU tensors.

    That interpreter cuts fp32 off where it makes bf16 of it; here it rounds, as devices do.
    """
    triton = pytest.importorskip("triton")
    from triton import language
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    # It takes functions of the standard library when it is imported, so before they are changed.
    importlib.import_module("triton.experimental.gluon.language")

    def convert(values, source, target, rounding):
        if (source, target) == (language.float32, language.bfloat16):
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return cut_off(values, source, target, rounding)

    def call(function, *args, **kwargs):  # as its own, which leaves Triton's language changed for good
        scope = interpreter._patch_lang(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    cut_off = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(InterpretedFunction, "__call__", call)

    def load(name: str):
        module = importlib.import_module(f"qlora_tool.ops.kernels.{name}")
        for place in (module, language, language.standard):  # sums are functions of Triton's own standard library
            for attribute, value in list(vars(place).items()):
                if isinstance(value, triton.JITFunction):
                    monkeypatch.setattr(place, attribute, InterpretedFunction(value.fn))
        return module

    return load


CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture(params=CAPABILITIES, ids="sm_{}".format)
def assembly(request):
    """PTX of a kernel for a compute capability: `assembly(kernel, types, constants)` with the types of its arguments by
    name as Triton writes them; those that end in `@16` are multiples of 16, or point to such addresses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel, types: dict[str, str], constants: dict[str, object], **options) -> str:
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                      for name, kind in types.items() if kind.endswith("@16")}  # fmt: skip
        signature = {name: types[name].removesuffix("@16") if name in types else "constexpr"
                     for name in kernel.arg_names}  # fmt: skip
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options).asm["ptx"]

    return compiled
