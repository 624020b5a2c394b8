import shutil
from pathlib import Path

import pytest
from tools.check_graph import GRAPH, ROOT, cycles, imported, list_modules, violations


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small copy of the workspace: the pyprojects and one empty module each."""
    for folder, (module, _) in GRAPH.items():
        source = tmp_path / "packages" / folder / "src" / module
        source.mkdir(parents=True)
        (source / "__init__.py").write_text("")
        shutil.copy(ROOT / "packages" / folder / "pyproject.toml", source.parents[1])
    return tmp_path


def test_the_import_graph_of_the_house_holds() -> None:
    assert violations() == []


def test_a_copy_of_the_house_holds(house: Path) -> None:
    assert violations(house) == []


def test_an_import_up_the_graph_is_named_with_its_line(
    house: Path, subtests: pytest.Subtests
) -> None:
    for line in [
        "import wm_victim",
        "from wm_victim.models import build_classifier",
        "def later() -> None:\n    import wm_victim as victim",
        "import importlib\nimportlib.import_module('wm_victim.models')",
    ]:
        with subtests.test(line=line):
            module = house / "packages" / "wm-extract" / "src" / "wm_extract" / "unet.py"
            module.write_text(f"{line}\n")
            (found,) = violations(house)
            assert found.startswith("packages/wm-extract/src/wm_extract/unet.py:")
            assert found.endswith("wm_extract may not import wm_victim")


def test_folder_names_and_tools_are_not_imported(house: Path, subtests: pytest.Subtests) -> None:
    for name in ["eval", "victim", "tools.release"]:
        with subtests.test(name=name):
            (house / "packages" / "eval" / "src" / "wm_eval" / "cli.py").write_text(
                f"import {name}\n"
            )
            (found,) = violations(house)
            assert f"wm_eval may not import {name.partition('.')[0]}" in found


def test_tests_keep_the_graph_too(house: Path) -> None:
    tests = house / "packages" / "victim" / "tests"
    tests.mkdir()
    (tests / "test_models.py").write_text("from defense_nc import scan\n")
    assert violations(house) == [
        "packages/victim/tests/test_models.py:1: wm_victim may not import defense_nc"
    ]


def test_a_forbidden_requirement_is_found(house: Path) -> None:
    pyproject = house / "packages" / "wm-inject" / "pyproject.toml"
    text = pyproject.read_text().replace('"pillow>=11"', '"pillow>=11", "wm_eval[x]>=0.1,<0.2"')
    pyproject.write_text(text)
    assert violations(house) == [
        "packages/wm-inject/pyproject.toml: wm_inject may not require wm_eval"
    ]


def test_an_import_that_is_not_required_is_found(house: Path) -> None:
    pyproject = house / "packages" / "defense-nc" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"wm-victim>=0.2,<0.3",', ""))
    (pyproject.parent / "src" / "defense_nc" / "scan.py").write_text("import wm_victim\n")
    (found,) = violations(house)
    assert found.endswith("wm_victim is imported but not required in pyproject.toml")


def test_a_seventh_or_a_missing_package_is_found(house: Path) -> None:
    shutil.copytree(house / "packages" / "eval", house / "packages" / "extra")
    shutil.rmtree(house / "packages" / "victim")
    assert violations(house) == [
        "packages/extra: not one of the six packages",
        "packages/victim: missing",
    ]


def test_relative_imports_and_strings_are_no_edges() -> None:
    assert (
        list(imported("from . import x\nfrom .wm_eval import y\ntext = 'import wm_eval'\n")) == []
    )


def test_a_cycle_inside_functions_too_is_found(house: Path) -> None:
    folder = house / "packages" / "eval" / "src" / "wm_eval"
    (folder / "one.py").write_text("def later():\n    from wm_eval import two\n")
    (folder / "two.py").write_text("from wm_eval.one import x\n")
    (found,) = cycles(list_modules(house))
    assert found.startswith("import cycle") and "wm_eval.one" in found and "wm_eval.two" in found
    (folder / "two.py").write_text("if TYPE_CHECKING:\n    from wm_eval.one import x\n")
    assert list(cycles(list_modules(house))) == []


def test_torch_is_found_behind_the_folders_without_it(house: Path) -> None:
    folder = house / "packages" / "wm-inject" / "src" / "wm_inject"
    (folder / "runtime").mkdir()
    (folder / "runtime" / "__init__.py").write_text("from wm_inject import middle\n")
    (folder / "middle.py").write_text("from wm_inject.far import x\n")
    (folder / "far.py").write_text("def later():\n    import torch\n")
    assert violations(house) == []
    (folder / "far.py").write_text("from torch import nn\n")
    assert violations(house) == [
        "wm_inject.runtime imports torch by way of "
        "wm_inject.far <- wm_inject.middle <- wm_inject.runtime"
    ]
    (folder / "far.py").write_text("")
    (folder / "runtime" / "own.py").write_text("def later():\n    import torch\n")
    assert violations(house) == ["wm_inject.runtime.own may not import torch"]
