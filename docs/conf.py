"""Sphinx's configuration: `sphinx-build -W docs docs/_build`."""

import re
from typing import Any

project = "cpql"
author = "The cpql developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = "cpql"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "show-inheritance": False, "exclude-members": "__init__, __new__"}
default_role = "code"  # docstrings are Markdown in spirit: one backtick is code


SECTIONS = {"Args:", "Attributes:", "Returns:", "Raises:", "Yields:", "Example:"}


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with `code`: stars and bars mean themselves, formulas are indented."""
    parts = "\n".join(lines).split("`")
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    found = list[str]()
    for escaped in "`".join(parts).split("\n\n"):
        plain = re.sub(r"\\([*|])", r"\1", escaped)
        last = found[-1].rstrip().rpartition("\n")[2] if found else ""
        formula = escaped.startswith("    ") and last not in SECTIONS and not last.startswith("    ")
        found.append(f"::\n\n{plain}" if formula else escaped)
    lines[:] = "\n\n".join(found).split("\n")


def setup(app: Any) -> None:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
