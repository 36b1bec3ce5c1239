"""What is imported is declared in pyproject.toml, what is declared is imported, and all of it has a pinned version."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
KERNELS = "qlora_tool/ops/kernels/"  # whose modules are imported where Triton is
FOR_TESTS = {"test", "docs", "llama-cpp"}  # extras of which the package itself imports nothing


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements: Iterable[str]) -> set[str]:
    """The normalized names in requirements such as `torch>=2.11`."""
    return {normalized(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in requirements}


def imported(source: str) -> dict[str, bool]:
    """The packages of others that a module imports, anywhere in it, each with whether that happens when it is itself
    imported: not in a function, not for type checkers alone."""
    tree = ast.parse(source)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        for name in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"qlora_tool"}:
            found[name] = found.get(name, False) or node not in late
    return found


def faults(
    sources: Mapping[str, str], dependencies: Iterable[str], extras: Iterable[str], owners: Mapping[str, list[str]]
) -> list[str]:
    """What is imported and not declared, or declared and not imported.

    Args:
        sources: the package's modules, text by name.
        dependencies: requirements that are always installed.
        extras: those that are installed on demand, so that no module may need them to be imported.
        owners: the distributions that a package to import comes from.
    """
    always, on_demand = distributions(dependencies), distributions(extras)
    used, lines = set(), []
    for file, source in sources.items():
        for name, at_once in sorted(imported(source).items()):
            owner = {normalized(distribution) for distribution in owners.get(name, [name])}
            used |= owner
            if not owner & (always | on_demand):
                lines.append(f"{file} imports {name}, which is not declared")
            elif at_once and not owner & always:
                lines.append(f"{file} imports {name}, which is there with an extra alone, outside of functions")
    return lines + [f"{name} is declared and never imported" for name in sorted((always | on_demand) - used)]


def sources_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    package = sources_of(ROOT / "qlora_tool")
    assert len(package) > 50
    extras = [line for name, lines in EXTRAS.items() if name not in FOR_TESTS for line in lines]
    found = faults(package, PROJECT["dependencies"], extras, packages_distributions())
    assert [line for line in found if not (line.startswith(KERNELS) and "imports triton, which is there" in line)] == []


def test_what_the_tests_import_is_declared():
    tests = sources_of(ROOT / "tests")
    tools = [folder.name for folder in (ROOT / "tools").iterdir() if folder.is_dir()]
    own = {name: ["qlora-tool"] for name in (*(Path(file).stem for file in tests), *tools)}
    known = {"llama_cpp": ["llama-cpp-python"], "tomli": ["pytest"]}  # absent from some environments
    declared = ["qlora-tool", *PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    found = faults(tests, declared, [], packages_distributions() | known | own)
    assert [line for line in found if "which is not declared" in line] == []


def test_every_dependency_has_a_pinned_version():
    pins = [line for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines() if "==" in line]
    extras = [line for name, lines in EXTRAS.items() if name != "llama-cpp" for line in lines]  # its users compile it
    assert distributions([*PROJECT["dependencies"], *extras]) <= distributions(pins)


def test_the_extras_that_doctor_names_can_be_installed():
    from qlora_tool.cli.doctor import ABILITIES

    for _, package, extra in ABILITIES:
        assert normalized(package) in distributions(EXTRAS[extra])
    assert {extra for *_, extra in ABILITIES} == EXTRAS.keys() - {"test", "docs"}


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed():
    older = dict(line.split("==") for line in (ROOT / "tools" / "constraints-oldest.txt").read_text().splitlines()
                 if "==" in line)  # fmt: skip
    for name in ("torch", "transformers"):
        [allowed] = (line for line in PROJECT["dependencies"] if line.startswith(f"{name}>="))
        lowest = re.match(r"[a-z]+>=([\d.]+)", allowed)[1]
        assert older[name].removesuffix(".0") == lowest.removesuffix(".0"), name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import yaml", []),
        ("import other.part", ["a.py imports other, which is not declared"]),
        ("def f():\n    from other.part import x", ["a.py imports other, which is not declared"]),
        ("if TYPE_CHECKING:\n    import other", ["a.py imports other, which is not declared"]),
        ("import os.path\nfrom . import other\nfrom qlora_tool import x", []),
        ("def f():\n    import extra", []),
        ("if TYPE_CHECKING:\n    import extra", []),
        ("import extra", ["a.py imports extra, which is there with an extra alone, outside of functions"]),
        ("class C:\n    import extra\ndef f():\n    import extra",
         ["a.py imports extra, which is there with an extra alone, outside of functions"]),
    ],
)  # fmt: skip
def test_a_planted_import_is_found(source, found):
    sources = {"a.py": source, "b.py": "import yaml\ndef f():\n    import extra"}
    assert faults(sources, ["PyYAML>=6.0"], ["Extra[all]>=1,<2"], {"yaml": ["PyYAML"], "extra": ["extra"]}) == found


def test_a_planted_dependency_that_nothing_uses_is_found():
    assert faults({"a.py": "import yaml"}, ["PyYAML", "Some_Thing>=1"], ["other"], {"yaml": ["PyYAML"]}) == [
        "other is declared and never imported", "some-thing is declared and never imported",
    ]  # fmt: skip
