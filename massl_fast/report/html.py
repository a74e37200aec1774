"""The HTML pages that runs and benchmarks are shown on, from templates: one self-contained file, no script, no network.

Whatever a template prints is escaped; what is ``Markup`` already is not: drawings, and names broken by ``breakable``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Drawing:
    """A figure of a page."""

    title: str
    svg: str
    note: str = ""
    name: str = ""
    """Name of its file, where a document shows it, too; otherwise empty."""


def render(template: str, **values: Any) -> str:
    """A whole page from ``templates/TEMPLATE``."""
    return _PAGES.get_template(template).render(values)


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) of nested mappings, names of an inner one after those of the outer one."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name} · ") if isinstance(value, dict) and value else [(name, value)]
    return rows


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(shown(v) if isinstance(v, float) else str(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def breakable(name: str) -> Markup:
    """A name that may be broken after each underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def labelled(svg: str, title: str) -> Markup:
    """A drawing with its title for readers that do not see it."""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def code(text: str) -> Markup:
    """Text in which words between backticks are code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def whole_options(text: str) -> Markup:
    """Text whose options, such as --data.num_workers, are not broken after their dashes."""
    return Markup(re.sub(r"(--[\w.]+)", r'<span class="whole">\1</span>', str(escape(text))))


_PAGES = Environment(
    loader=PackageLoader("massl_fast.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_PAGES.filters |= {"shown": shown, "breakable": breakable, "labelled": labelled, "code": code, "whole_options": whole_options}
