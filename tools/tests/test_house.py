"""What every package and every page of the house keeps to."""

import ast
import importlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules

import pytest
from packaging.version import Version
from tools import release

ROOT = release.ROOT
PACKAGES = release.packages()
SKIPPED = {"dist", "runs", "build"}
TEXT = {".py", ".md", ".toml", ".txt", ".in", ".ini", ".cff", ".json", ".html", ".svg", ".csv", ""}

# In pieces, so that this file does not name them either.
REGISTRIES = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
    "anaconda" + ".org",
]
MACHINE_PATH = re.compile(r"(?<![\w.{}~-])/(?:home|work|root|Users|mnt)/\w|\b[A-Z]:\\Users")


def texts() -> Iterator[Path]:
    """Every text file of the repository, hidden folders and build output left out."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = sorted(n for n in inner if not n.startswith((".", "__")) and n not in SKIPPED)
        kept = (n for n in sorted(names) if Path(n).suffix in TEXT and n != ".coverage")
        yield from (Path(folder, n) for n in kept)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules(package: release.Package) -> list[Path]:
    return sorted((package.home / "src" / package.module).rglob("*.py"))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_every_package_has_the_same_files(subtests: pytest.Subtests) -> None:
    for package in PACKAGES:
        with subtests.test(package=package):
            source = package.home / "src" / package.module
            for path in (source / "py.typed", source / "cli.py", package.home / "tests"):
                assert path.exists(), f"{place(path)} is missing"
            assert not (package.home / "tests" / "__init__.py").exists()
            assert (package.home / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
            assert package.about.read_text() == f'__version__ = "{package.version}"\n'
            assert re.fullmatch(r"\d+\.\d+\.\d+", str(package.version))
            assert "\n## Unreleased\n" in package.changelog.read_text()


def test_every_pyproject_has_the_same_shape(subtests: pytest.Subtests) -> None:
    for package in PACKAGES:
        with subtests.test(package=package):
            settings = tomllib.loads(package.pyproject.read_text())
            project = settings["project"]
            assert settings["build-system"]["build-backend"] == "hatchling.build"
            assert project["requires-python"] == ">=3.11,<3.14"
            assert project["license"] == "MIT" and project["license-files"] == ["LICENSE"]
            assert project["scripts"] == {package.name: f"{package.module}.cli:main"}
            assert project["dynamic"] == ["version"]
            assert "Typing :: Typed" in project["classifiers"]


def test_every_package_says_what_is_public(subtests: pytest.Subtests) -> None:
    for package in PACKAGES:
        with subtests.test(package=package):
            module = importlib.import_module(package.module)
            names = module.__all__
            assert len(names) == len(set(names)), "each name once"
            assert module.__version__ == str(package.version)
            for name in names:
                assert getattr(module, name).__doc__, f"{package.module}.{name} has no docstring"
            # Importing a submodule of that name would hide a name that is imported on first use.
            assert not set(names) & {info.name for info in iter_modules(module.__path__)}


def test_every_init_has_an_all(subtests: pytest.Subtests) -> None:
    for path in [
        path for package in PACKAGES for path in modules(package) if path.name == "__init__.py"
    ]:
        with subtests.test(path=path):
            tree = ast.parse(path.read_text())
            names = [
                n
                for n in ast.walk(tree)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
            assert "__all__" in [name.id for name in names]


def test_a_package_readme_shows_its_use(subtests: pytest.Subtests) -> None:
    for package in PACKAGES:
        with subtests.test(package=package):
            page = package.home / "README.md"
            assert page.read_text().startswith(f"# {package.name}\n")
            assert code_blocks(page, "python"), "a short example in Python"
            command = re.search(rf"^(\$ )?{package.name} [a-z]", page.read_text(), re.MULTILINE)
            assert command, "a line that runs its command"


def test_the_readme_names_the_two_commands_before_its_first_section() -> None:
    opening = (ROOT / "README.md").read_text().partition("\n## ")[0]
    for script in ("demo", "test"):
        assert f"pip install hatch && hatch run {script}" in opening


def test_what_a_readme_imports_exists(subtests: pytest.Subtests) -> None:
    for page in [*sorted(ROOT.glob("packages/*/README.md")), ROOT / "README.md"]:
        with subtests.test(page=page):
            for block in code_blocks(page, "python"):
                for node in ast.walk(ast.parse(block)):
                    if isinstance(node, ast.ImportFrom) and node.module:
                        module = importlib.import_module(node.module)
                        missing = [a.name for a in node.names if not hasattr(module, a.name)]
                        assert not missing, f"{node.module} has no {missing}"


def test_the_study_in_the_readme_can_be_read(tmp_path: Path) -> None:
    from wm_eval import load_study

    (block,) = code_blocks(ROOT / "README.md", "toml")
    (tmp_path / "study.toml").write_text(block)
    assert load_study(tmp_path / "study.toml").name == "mine"


def test_links_inside_the_house_lead_somewhere(subtests: pytest.Subtests) -> None:
    for page in sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")}):
        with subtests.test(page=page):
            for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_modules_of_the_architecture_page_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Where things are")[2]
    modules = 0
    for name, section in re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL):
        (home,) = [ROOT / "tools"] if name == "tools" else ROOT.glob(f"packages/*/src/{name}")
        named = re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*(?:\.py|/))`", section)
        modules += len(named)
        assert [path for path in named if not list(home.glob(f"**/{path}"))] == []
    assert modules > 60


def test_the_root_has_what_it_needs_and_no_pyproject() -> None:
    names = "README.md CONTRIBUTING.md SECURITY.md CITATION.cff LICENSE hatch.toml ruff.toml"
    for name in [*names.split(), "mypy.ini", "pytest.ini", "constraints.txt", ".ci/run"]:
        assert (ROOT / name).is_file(), f"{name} is missing"
    assert not (ROOT / "pyproject.toml").exists(), "pip would take it for a project"


def test_the_constraints_pin_and_name_no_place() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 20
    for line in lines:
        pin = re.fullmatch(r"[A-Za-z0-9._-]+==([^\s;]+)( ; .+)?", line)
        assert pin, f"expected NAME==VERSION, got {line}"
        Version(pin[1])
    pinned = {line.partition("==")[0] for line in lines}
    assert not pinned & {package.name for package in PACKAGES}


def test_no_file_names_a_registry_or_a_place_on_a_machine() -> None:
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if any(host in line for host in REGISTRIES) or MACHINE_PATH.search(line):
                found.append(f"{place(path)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_code_is_finished() -> None:
    # In pieces for the same reason as above.
    marks = re.compile("TO" + r"DO\b|FIX" + r"ME\b|pragma: no " + r"cover|pytest\.mark\.xf" + "ail")
    code = [path for path in texts() if path.suffix == ".py"]
    found = [place(path) for path in code if marks.search(path.read_text())]
    assert found == []


def test_nothing_unpickles() -> None:
    """Two files may: in a child process with limits, every opcode looked at; one known digest."""
    loaders = ("wm_victim/loading/state_files.py", "wm_victim/imagenet_weights.py")
    for package in PACKAGES:
        for path in modules(package):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            for call in calls:
                name = ast.unparse(call.func)
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert given.get("weights_only") != "False", f"{place(path)} unpickles"
                if name in ("torch.load", "pickle.load", "pickle.loads"):
                    allowed = place(path).endswith(loaders)
                    safe = given.get("weights_only") == "True"
                    assert allowed and safe, f"{place(path)} unpickles"
