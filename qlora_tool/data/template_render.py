"""Renders one template, as a program of its own that `template_trial` starts and may kill; it imports `jinja2` alone.

It reads `[template, messages, variables, bytes of memory]` as JSON, and writes `memory` where that was not enough.
"""

from __future__ import annotations

import contextlib
import json
import sys


def main() -> None:
    """Read, render, say how it went."""
    source, messages, kwargs, memory = json.load(sys.stdin)
    with contextlib.suppress(ImportError, ValueError, OSError):  # another system: the time counts alone
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])  # fmt: skip

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.filters["tojson"] = lambda value, **options: json.dumps(value, indent=options.get("indent"))
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": str}
    try:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<s>")
        environment.from_string(source).render(messages=messages, tools=None, add_generation_prompt=False,
                                               **names | kwargs)
    except MemoryError:
        print("memory", flush=True)
    except Exception:  # told when it is rendered for the first time
        print("refused", flush=True)


if __name__ == "__main__":
    main()
