"""Which chat templates are tried in a process of their own first."""

from __future__ import annotations

import time

import pytest

from qlora_tool.data.template_trial import may_run_away, try_template
from qlora_tool.errors import UserError

TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("template", [
    "{% set n.x = n.x + n.x %}", "{{ n.x ~ 'a' ~ n.x }}", "{{ (n['x'] + 'b') + ('c' ~ n['x']) }}",
    "{{ a * b }}", "{{ a ** b }}", "{{ a|center(b) }}", "{{ '%9999999d' % 1 }}", "{{ a.replace(b, c) }}",
])  # fmt: skip
def test_what_may_grow_in_a_few_steps_is_tried(template):
    assert may_run_away(template)


@pytest.mark.parametrize("template", [
    "{{ message.role + message.content }}", "{{ 'a' + 'a' }}", "{{ m['role'] + '\n' + m['content'] + eos_token }}",
    "{% set ns.x = ns.x + 1 %}{{ ns.x ~ x }}", "{{ a.replace('\n', ' ') }}",
])  # fmt: skip
def test_others_start_as_fast_as_ever(template):
    assert not may_run_away(template)


@pytest.mark.parametrize("start", ["'a'", "[1]", "(1,)"])
@pytest.mark.parametrize("sign", ["+", "~"])
def test_what_doubles_is_stopped_within_its_memory(start, sign):
    source = (f"{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = n.x {sign} n.x %}}"
              f"{{% endfor %}}{{{{ n.x|length }}}}")  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(UserError, match="makes more of a conversation of 1 turn than 512 MiB hold"):
        try_template([source], TURNS, {})
    assert time.monotonic() - begin < 10
