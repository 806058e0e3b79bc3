"""Each line of docs/security.md is held by the tests that it names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)?::(\w+)`")


def test_each_line_names_tests_that_there_are():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| who", "| what |"))]
    assert rows
    for row in rows:
        named, file = NAMED.findall(row), ""
        assert named, row
        for given, test in named:
            file = given or file
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, test)
