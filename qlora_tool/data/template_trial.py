"""Whether a chat template comes to an end and stays within bounds, found out before it runs in this process.

A template is a program. Its loops are Python's, and `time_limit` stops them; but a single step may take for ever, or
all memory, and nothing stops that from outside: `'a' * 10**10`, `10**10**10`, `'%9999999999d'`. One that has such steps
in it (hardly any has) is rendered once in a process of its own, which can be killed: without transformers, in Jinja's
sandbox, by what `jinja2` alone has, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tool.errors import UserError
from qlora_tool.sizes import counted

SECONDS = 5.0
MEMORY = 512 << 20  # bytes: a list that doubles goes beyond it by several times before it can be stopped
CURE = "mend it, or name another with data.chat_template"

_LARGE = 100_000
_DIGITS = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*")
_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "indent", "batch", "slice",
            "wordwrap",
            "int", "sum", "lipsum"}  # fmt: skip
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own statement
_TRIAL = Path(__file__).with_name("template_render.py")
_tried: set[str] = set()
PATIENCE = 2.0  # seconds that may go into refusals one after the other, where they are slow
_SLOW = 0.02  # seconds for one: what a template raises on purpose takes a hundredth of it


class Refusals:
    """Counts how often a template refuses one after the other, and how long that takes: one that fails slowly on every
    row is not tried on a million of them."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def written(self) -> None:
        """It wrote a conversation."""
        self.count, self.seconds = 0, 0.0

    def refused(self, seconds: float, reason: str) -> None:
        """It refused one, and took so long for that.

        Raises:
            UserError: the last ones were many, and slow.
        """
        self.count += 1
        self.seconds += seconds
        if self.seconds > max(PATIENCE, _SLOW * self.count):
            raise UserError(f"the chat template failed on {counted(self.count, 'conversation')} one after the other, "
                            f"and took {self.seconds:.1f} seconds for it ({reason}); {CURE}")  # fmt: skip


def try_template(sources: Sequence[str], messages: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Try templates that have not been tried yet, on one conversation.

    Raises:
        UserError: one is not done in time, or takes more memory than a text needs.
    """
    for source in sources:
        if source in _tried:
            continue
        if may_run_away(source):
            _try(source, messages, kwargs)
        _tried.add(source)


def may_run_away(source: str) -> bool:
    """Whether a few steps of a template may make a large text or number: a product, a power, a format, a width, a sum
    of a thing with itself."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
        if any(_grows_text(node) for node in tree.find_all((nodes.Call, nodes.Filter))):
            return True
        if any(_doubles(node) for node in tree.find_all((nodes.Add, nodes.Concat))):
            return True
        for node in tree.find_all((nodes.Mul, nodes.Pow, nodes.Const, nodes.Filter, nodes.Getattr, nodes.Name)):
            if isinstance(node, nodes.Mul | nodes.Pow):
                return True
            if isinstance(node, nodes.Const) and _is_large(node.value):
                return True
            name = getattr(node, "attr", None) or getattr(node, "name", None)
            if name in _GROWING:
                return True
    except RecursionError:
        raise UserError(f"the chat template: blocks or brackets in one another are too deep to be read; "
                        f"{CURE}") from None
    except jinja2.TemplateError:  # told when it is rendered
        return False
    return False


def _grows_text(node: Any) -> bool:
    """Whether it may put more in the place of a text than was there."""
    name = node.name if hasattr(node, "name") else getattr(node.node, "attr", None)
    if name not in ("replace", "join"):
        return False
    texts = [getattr(arg, "value", None) for arg in node.args]
    if name == "join":
        return not all(isinstance(text, str) and len(text) < 16 for text in texts)
    known = len(texts) == 2 and all(isinstance(text, str) for text in texts)
    return not known or len(texts[1]) > 8 * max(1, len(texts[0]))


def _doubles(sum_: Any) -> bool:
    """Whether it adds a thing to itself: in a loop that is a power of two."""
    from jinja2 import nodes

    seen: list[Any] = []
    waiting = [sum_]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Add | nodes.Concat):
            waiting += node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
        elif not isinstance(node, nodes.Literal):
            if node in seen:
                return True
            seen.append(node)
    return False


def _is_large(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_DIGITS.search(value))
    return isinstance(value, int | float) and abs(value) >= _LARGE


def _try(source: str, messages: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = json.dumps([_GENERATION.sub("", source), list(messages), dict(kwargs), MEMORY], default=str)
    try:
        done = subprocess.run([sys.executable, "-I", str(_TRIAL)], input=given.encode("utf-8", "replace"),
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS,
                              check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the chat template was not done with a conversation of {counted(len(messages), 'turn')} after "
            f"{SECONDS:g} seconds (an endless loop, or a text or number without bounds?); {CURE}"
        ) from error
    except OSError:  # no process to be had: what is left are the limits of this one
        return
    if done.stdout.strip() == b"memory" or done.returncode < 0:
        raise UserError(
            f"the chat template makes more of a conversation of {counted(len(messages), 'turn')} than "
            f"{MEMORY >> 20} MiB hold; {CURE}"
        )
