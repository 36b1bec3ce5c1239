"""The documents: the list of keys is complete, commands parse, and what they name is there."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
from making.coming_from_page import page as page_of_other_tools
from making.configuration_page import page as page_of_keys
from measuring.command import load_subject, parser_of

import qlora_tool
from qlora_tool.cli import main
from qlora_tool.config import SECTIONS

ROOT = Path(__file__).parents[1]
PACKAGES = {"tools/measure": "measuring", "tools/make": "making"}
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_page_of_keys_is_the_schema():
    """Where this fails: `tools/make configuration-page > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page_of_keys()


def test_the_page_of_other_tools_is_their_tables():
    """Where this fails: `tools/make coming-from-page > docs/coming-from.md`."""
    assert (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8") == page_of_other_tools()


def test_the_page_of_keys_lists_every_key_under_its_section():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        rows = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        listed = re.findall(r"^\| `(\w+)` \| (\S*)", rows, re.MULTILINE)
        with_default = {key for key, default in listed if default}
        assert with_default == set(section.model_fields), name


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_what_verification_prints_is_shown_as_it_is(page: str):
    """The bf16 export of the table, as `tools/measure export` found it."""
    from qlora_tool.export.verification import Proof, Update
    from qlora_tool.export.verify import Agreement

    found = Agreement(5000, 1.2549e-4, 1.7835e-3, 0.9964, 859, 1.823272, 1.823169, 4.210853, 4.213512)
    rows = "shell_commands_eval.jsonl (evaluation)"
    proof = Proof("dequantized", "bfloat16", rows, found, Update(0.998259, 0.325003))
    assert "\n".join(proof.lines()) in (ROOT / page).read_text(encoding="utf-8")


def test_python_in_the_readme_calls_what_there_is():
    """Every name that is imported, and every argument that is given by name."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {call.func.id for call in calls} == {
        "evaluate", "export_merged", "generate", "inspect", "preview", "profile_memory", "train",
    }  # fmt: skip
    for call in calls:
        arguments = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(getattr(qlora_tool, call.func.id)).bind(*call.args, **arguments)


# ---------------------------------------------------------------------------------- what a page says can be typed


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, a comment at their end left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split("   #")[0].split(" > ")[0].strip() for block in blocks for line in block.splitlines()]


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks, on one line each."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()).split(" > ")[0] for found in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[str]:
    """Every command of ours on a page.

    Raises:
        AssertionError: there is none, so that nothing would be checked.
    """
    found = [line for line in code(page) + inline_code(page) if re.match(r"(qlora-tool|tools/\w+)( |$)", line)]
    assert found, f"{page.name} shows no command: nothing on it can be checked"
    return found


def check_command(line: str) -> None:
    """Parse a command as it would be when typed; one that is only named (`qlora-tool train`) has to be there."""
    program, *words = shlex.split(line)
    if program == "qlora-tool" and words and "COMMAND" not in words:
        command = main.get_command(click.Context(main), words[0])
        assert command is not None, line
        if words[1:]:
            command.make_context(words[0], words[1:])  # raises a UsageError for an option or value that does not exist
    elif program in PACKAGES and words and words[0] not in ("SUBJECT", "--help"):
        parser = parser_of(load_subject(PACKAGES[program], words[0]))
        if words[1:]:
            parser.parse_args(words[1:])  # exits for an option or value that does not exist
    else:
        assert program == "qlora-tool" or (ROOT / program).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_ones_that_parse(page: Path):
    for line in commands(page):
        check_command(line)


@pytest.mark.parametrize("text", [
    "No command at all, but an option: `--json`.", "```\nqlora-tool trian demo\n```", "`tools/nothing`",
    "`qlora-tool train demo --sett a=1`", "`tools/measure benchmrk`", "`tools/measure load demo --quantization nf5`",
])  # fmt: skip
def test_a_page_that_would_mislead_fails(tmp_path: Path, text: str):
    """Among them one without a command, which would pass for want of anything to check."""
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, click.UsageError, ModuleNotFoundError, SystemExit)):
        for line in commands(page):
            check_command(line)


def known_options() -> set[str]:
    """Every long option of a command or a tool, and those of llama.cpp, pip and uv that pages name."""
    context = click.Context(main)
    found = {"--help", "--lora", "--lora-scaled", "--no-deps", "--python", "--torch-backend"}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        found |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    helps = [parser_of(load_subject(package, name)).format_help()
             for package in PACKAGES.values() for name in __import__(package).SUBJECTS]  # fmt: skip
    scripts = [(ROOT / "tools" / name).read_text(encoding="utf-8") for name in ("test", "quickstart")]
    return found | set(re.findall(r"--[a-z][a-z-]+", "\n".join(helps + scripts)))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_that_are_named_are_there(page: Path):
    named = set(re.findall(r"(?<=[ `(\[])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert named and named - known_options() == set()


def test_keys_that_are_named_are_there():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(rf"(?<![\w/])({'|'.join(SECTIONS)})\.(?!md\b)([a-z]\w*)", text))
    assert ("training", "max_memory") in named  # the pattern finds keys where they are
    unknown = {f"{section}.{key}" for section, key in named if key not in SECTIONS[section].model_fields}
    assert unknown <= {"training.lerning_rate"}  # which shows what becomes of a misspelt key


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tools|docs|tests|configs|qlora_tool)/[\w./-]*)[ `]", text)
    named += re.findall(r"^((?:tools|docs)/[\w./-]+)", "\n".join(code(page)), re.MULTILINE)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
