"""The documents: the list of keys is complete, commands parse, and what they name is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import qlora_tool
from qlora_tool.cli import main
from qlora_tool.config import SECTIONS

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture
def configuration_page(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return importlib.import_module("scripts").load_script("configuration_page").page()


def test_the_page_of_keys_is_the_schema(configuration_page):
    """Where this fails: `tools/configuration_page > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_page


def test_the_page_of_keys_lists_every_key_under_its_section():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        rows = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        listed = re.findall(r"^\| `(\w+)` \| (\S*)", rows, re.MULTILINE)
        with_default = {key for key, default in listed if default}
        assert with_default == set(section.model_fields), name


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_what_verification_prints_is_shown_as_it_is(page: str):
    """The bf16 export of the table, as `tools/check_export` found it."""
    from qlora_tool.export.proof import Proof, Update
    from qlora_tool.export.verify import Agreement

    found = Agreement(5000, 1.2549e-4, 1.7835e-3, 0.9964, 859, 1.823272, 1.823169, 4.210853, 4.213512)
    rows = "shell_commands_eval.jsonl (evaluation)"
    proof = Proof("dequantized", "bfloat16", rows, found, Update(0.998259, 0.325003))
    assert "\n".join(proof.lines()) in (ROOT / page).read_text(encoding="utf-8")


def test_python_in_the_readme_calls_what_there_is():
    """Every name that is imported, and every argument that is given by name."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {call.func.id for call in calls} == {"evaluate", "export_merged", "generate", "profile_memory", "train"}
    for call in calls:
        arguments = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(qlora_tool, call.func.id)).bind(*call.args, **arguments)


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, a comment at their end left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split("   #")[0].split(" > ")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_ones_that_parse(page: Path):
    for line in code(page):
        if not line.startswith("qlora-tool ") or "COMMAND" in line:
            continue
        name, *arguments = shlex.split(line)[1:]
        command = main.get_command(click.Context(main), name)
        assert command is not None, line
        command.make_context(name, arguments)  # raises a UsageError for an option or a value that does not exist


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_that_are_named_are_there(page: Path):
    """In a command, a tool that the page names, or pytest's."""
    text = page.read_text(encoding="utf-8")
    context = click.Context(main)
    known = {"--help"}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    tools = {TOOLS / tool for tool in re.findall(r"tools/(\w+)", text) if (TOOLS / tool).is_file()}
    sources = "\n".join(file.read_text(encoding="utf-8") for file in tools)
    named = set(re.findall(r"(?<=[ `(\[])--[a-z][a-z-]+", text))
    assert {option for option in named - known if f'"{option}"' not in sources} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_keys_that_are_named_are_there(page: Path):
    named = re.findall(rf"(?<![\w/])({'|'.join(SECTIONS)})\.([a-z]\w*)", page.read_text(encoding="utf-8"))
    unknown = {f"{section}.{key}" for section, key in named if key not in SECTIONS[section].model_fields}
    assert unknown <= {"training.lerning_rate"}  # which shows what becomes of a misspelt key


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tools|docs|tests|configs|qlora_tool)/[\w./-]*)[ `]", text)
    named += re.findall(r"^((?:tools|docs)/[\w./-]+)", "\n".join(code(page)), re.MULTILINE)
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
