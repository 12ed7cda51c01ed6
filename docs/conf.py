"""Sphinx: `sphinx-build -W --keep-going -b html docs DIR`."""

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generated  # noqa: E402

import jx_neuron  # noqa: E402

project = "jx_neuron"
author = "the jx_neuron contributors"
release = version = jx_neuron.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
smartquotes = False  # they make a dash of the two hyphens of --flag, which then cannot be copied
default_role = "py:obj"  # in docstrings: a link where there is something to link to, and else a literal

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"jx_neuron {release}"
html_theme_options = {"sidebar_hide_name": False}

MARK = re.compile(r"<!-- generated: (command_line|notebook) -->")  # longer than a page, or with blocks of its own
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)")


def fill(_app: Any, _name: str, source: list[str]) -> None:
    """Puts a part where a document has its mark alone."""
    source[0] = MARK.sub(lambda mark: generated.PARTS[mark[1]](), source[0])


def as_fields(_app: Any, what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Makes field lists of the aligned `name: text` paragraphs of our docstrings, in which an asterisk is one."""
    field = "ivar" if what in ("class", "exception") else "param"
    made, listing = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        entry = ENTRY.fullmatch(line)
        listing = bool(line.strip()) and (listing or (not before.strip() and entry is not None))
        if listing and entry:
            line = f":{field} {entry['names'].replace(', ', '/')}: {entry['text']}"  # noqa: PLW2901
        made.append(line if line.startswith((" ", ">>>")) else line.replace("*", r"\*"))
    lines[:] = made


def signature(
    _app: Any, _what: str, _name: str, of: Any, _options: Any, given: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leaves out how a model is constructed, which `from_pretrained` does, and makes legal Python of dataclasses'."""
    return ("" if hasattr(of, "from_pretrained") else given and given.replace("<factory>", "...")), returns


def setup(app: Any) -> None:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_fields, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature)
