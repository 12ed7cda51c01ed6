"""Every Python block of the documents runs, each document in one namespace from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = [path for path in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_blocks_run(path: Path) -> None:
    namespace: dict[str, object] = {}
    for code in BLOCK.findall(path.read_text()):
        exec(compile(code, path.name, "exec"), namespace)


def test_there_are_documents_to_run() -> None:
    assert "lowering.md" in [path.name for path in DOCUMENTS]
