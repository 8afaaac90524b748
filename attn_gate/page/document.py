"""The parts of a page: one HTML file that needs nothing else, light and dark, for a desk and for a phone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from attn_gate.page.theme import Drawn

Cell = str | tuple[str, str]  # of a table: its text, or that and what is small beside it


def document(title: str, sections: Iterable[str], footer: str) -> str:
    """The whole page of these sections, empty ones left out; the title is text, the rest HTML."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>{footer}</footer>
</main>
</body>
</html>
"""


def header(title: str, lead: str) -> str:
    """The head of the page: its title and what it is about."""
    return f'<header><h1>{title}</h1>\n<p class="lead">{lead}</p></header>'


def notes(texts: Iterable[str]) -> str:
    """What must be seen first, each in a box."""
    return "".join(f'<p class="note">{text}</p>' for text in texts)


def numbers(items: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers in a row: (name, value, remark)."""
    boxes = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{remark}</small></dd></div>" for name, value, remark in items
    )
    return f'<dl class="numbers">{boxes}</dl>' if boxes else ""


def section(title: str, text: str, content: str) -> str:
    """A section, or nothing where there is no content."""
    text = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{title}</h2>{text}{content}</section>" if content else ""


def table(
    head: Sequence[str], rows: Iterable[tuple[str, str, Sequence[Cell]]], classes: Mapping[str, str] = {}
) -> str:
    """Rows of (class of the name, name, cells); classes: of the columns, by their titles.

    Text is escaped. A row without cells is a heading within the table. Where the screen is too narrow, the
    names stay and the rest is swiped.
    """
    kinds = [classes.get(title, "") for title in head]
    titles = "".join(_cell("th", *pair) for pair in zip(kinds, head, strict=True))
    lines = []
    for kind, name, cells in rows:
        if not cells:
            # The heading is as wide as the table: its text alone can stay when that is swiped.
            title = f"<span>{escape(name)}</span>"
            lines.append(f'<tr class="heading"><th colspan="{len(head)}">{title}</th></tr>')
            continue
        values = "".join(_cell("td", *pair) for pair in zip(kinds[1:], cells, strict=True))
        lines.append(f"<tr>{_cell('th', kind, name)}{values}</tr>")
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(tag: str, kind: str, content: Cell) -> str:
    text, beside = (content, "") if isinstance(content, str) else content
    small = f" <small>{escape(beside)}</small>" if beside else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{escape(text)}{small}</{tag}>"


def details(summary: str, content: str) -> str:
    """Content that is folded away until one asks for it."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def facts(items: Mapping[str, str]) -> str:
    """Names and what is to be said about each; text is escaped."""
    rows = "".join(f"<tr><th>{name}</th><td>{escape(fact)}</td></tr>" for name, fact in items.items())
    return f'<div class="table"><table class="facts">{rows}</table></div>'


def panels(figures: Iterable[str]) -> str:
    """Small figures side by side, as many as the screen has room for."""
    content = "".join(figures)
    return f'<div class="panels">{content}</div>' if content else ""


def figure(drawn: Drawn | None, alt: str, caption: str, scroll: str = "") -> str:
    """A figure with its caption, or nothing where it could not be drawn.

    scroll: "" for a panel; classes of a wide one, which a phone's user swipes.
    """
    if drawn is None:
        return ""
    picture = f"""<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(drawn.dark)}">
<img alt="{escape(alt)}" src="{_data(drawn.light)}"></picture>"""
    if scroll:
        picture = f'<span class="swipe">swipe →</span><div class="{scroll}" tabindex="0">{picture}</div>'
    kind = "wide" if scroll else "panel"
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
