"""The tool that puts errors into modules: which ones, and whether it tells good tests from poor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tools import mutate

SOURCE = '''"""A module."""


def clip(value: int | None, low: int = 0) -> int | None:
    """What lies below ``low`` is lifted to it."""
    if value < 0 or value is None:
        raise ValueError(f"expected more than {0 - 1}")
    return value if value > low else low
'''


def test_the_mutants_of_a_small_module() -> None:
    found = [(mutant.line, mutant.change) for mutant in mutate.mutants(SOURCE)]
    assert sorted(found) == [
        (4, "0 -> 1"),
        (6, "0 -> 1"),
        (6, "value < 0 -> value <= 0"),
        (6, "value < 0 or value is None -> value < 0 and value is None"),
        (6, "value is None -> value is not None"),
        (8, "value > low -> value >= low"),
        (8, "value if value > low else low -> value if not value > low else low"),
    ]


def test_what_an_expression_is_changed_to(subtests: pytest.Subtests) -> None:
    for before, after in [
        ("a + b", ["a - b"]),
        ("a * b / c", ["a * b * c", "a / b / c"]),
        ("a ** b", ["a * b"]),
        ("a & b", ["a | b"]),
        ("-a", ["a"]),
        ("not a", ["a"]),
        ("True", ["False"]),
        ("1.5", ["2.5"]),
        ("min(a, b)", ["max(a, b)"]),
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a in b", ["a not in b"]),
        ("'text'", []),
        ("f(a)", []),
    ]:
        with subtests.test(before=before, after=after):
            assert [ast.unparse(mutant.tree) for mutant in mutate.mutants(before)] == after


def test_a_mutant_has_one_change_and_the_others_do_not_see_it() -> None:
    trees = [ast.unparse(mutant.tree) for mutant in mutate.mutants("x = [1, 2]\ny = 1 + 2\n")]
    assert sorted(trees) == sorted(
        [
            "x = [2, 2]\ny = 1 + 2",
            "x = [1, 3]\ny = 1 + 2",
            "x = [1, 2]\ny = 2 + 2",
            "x = [1, 2]\ny = 1 + 3",
            "x = [1, 2]\ny = 1 - 2",
        ]
    )


def test_every_target_is_there_and_every_reason_belongs_to_a_mutant() -> None:
    changes = set()
    for target in mutate.TARGETS:
        assert all((mutate.ROOT / path).is_file() for path in target.tests)
        text = (mutate.ROOT / target.source).read_text()
        changes |= {(mutant.code, mutant.change) for mutant in mutate.mutants(text)}
    assert changes >= mutate.EQUIVALENT.keys()


TOY = """
import sys
from pathlib import Path
here, root = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [str(here), root]
from tools import mutate
mutate.ROOT = here
target = mutate.Target("toy.clipping", "toy/clipping.py", (sys.argv[3],))
total, survivors = mutate.check(target)
print(total, [mutant.change for mutant in survivors])
"""
GOOD = """
import pytest, toy
from toy.clipping import clip

def test_clip():
    assert [clip(value, 3) for value in (0, 3, 5)] == [3, 3, 5] and clip(0) == 0
    with pytest.raises(ValueError):
        toy.clip(-1)
"""
POOR = "import toy\n\ndef test_clip():\n    assert toy.clip(5, 3) == 5\n"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("text", "survivors"),
    [
        # At the limit both branches give the same; None is refused by the comparison before it.
        (GOOD, {"value > low -> value >= low", "value is None -> value is not None"}),
        (POOR, {"value < 0 -> value <= 0", "value > low -> value >= low", "0 -> 1"}),
    ],
    ids=["good", "poor"],
)
def test_good_tests_notice_what_poor_ones_do_not(
    tmp_path: Path, text: str, survivors: set[str]
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "clipping.py").write_text(SOURCE)
    init = "from toy.clipping import clip\n\n__all__ = ['clip']\n"
    (tmp_path / "toy" / "__init__.py").write_text(init)
    (tmp_path / "test_toy.py").write_text(text)
    command = [sys.executable, "-c", TOY, str(tmp_path), str(mutate.ROOT), "test_toy.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    total, _, told = done.stdout.partition(" ")
    assert int(total) == 7
    found = set(ast.literal_eval(told.strip()))
    if text == GOOD:
        assert found <= survivors and "0 -> 1" not in found
    else:
        assert survivors <= found


def test_tests_that_fail_by_themselves_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "clipping.py").write_text(SOURCE)
    (tmp_path / "toy" / "__init__.py").write_text("")
    (tmp_path / "test_toy.py").write_text("def test_no():\n    assert False\n")
    command = [sys.executable, "-c", TOY, str(tmp_path), str(mutate.ROOT), "test_toy.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "the tests of toy.clipping fail as it stands" in done.stderr
