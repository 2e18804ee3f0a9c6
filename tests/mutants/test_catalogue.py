"""Every mutant can still be made, and names tests that there are."""

import ast
import shutil
from pathlib import Path

import pytest

from mutants.catalogue import MUTANTS, Edit, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_is_python(mutant: Mutant, tmp_path: Path) -> None:
    package = tmp_path / "relay"
    shutil.copytree(ROOT / "relay", package, ignore=shutil.ignore_patterns("__pycache__"))
    mutant.apply(package)
    for module, _, _ in mutant.edits:
        changed = (package / module).read_text()
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse((ROOT / "relay" / module).read_text()))


@pytest.mark.parametrize("test", sorted({test for mutant in MUTANTS for test in mutant.caught_by}))
def test_what_catches_it_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    source = (ROOT / path).read_text()
    assert not name or f"def {name}(" in source or f"\n{name} = " in source


@pytest.mark.parametrize("source", ["", "here\nhere\n"])
def test_a_mutant_of_code_that_has_changed_says_so(tmp_path: Path, source: str) -> None:
    (tmp_path / "some.py").write_text(source)
    with pytest.raises(LookupError, match="an old mutant"):
        Mutant("an old mutant", [Edit("some.py", "here", "there")], []).apply(tmp_path)
