"""A report as one HTML file, which opens offline: pictures are inside, and there is no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff;
  max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0 0 1.5rem }
dt { color: #616e7c }
dd { margin: 0; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; display: block; margin: 0 0 1.5rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e4e7eb }
thead th { color: #616e7c; font-weight: 600; position: sticky; top: 0; background: #fff }
tbody th { font-weight: inherit }
th:first-child { text-align: left; padding-left: 0 }
tbody tr:hover { background: #f3f6fa }
@media (max-width: 60rem) {
  body { padding: 0 1rem }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin: 0 0 .5rem }
  .wide { overflow-x: auto } /* a page that scrolls to the side has no heading that stays */
  .wide img { max-width: none; width: 46rem }
}
"""


def page(
    title: str,
    facts: Iterable[tuple[str, str]],
    pictures: Iterable[tuple[str, bytes]],
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> str:
    """The text of the file.

    Args:
        facts: labels, and what is said of each.
        pictures: what each shows, and it as a PNG file.
        header, rows: of the table, its first column the names.
    """
    said = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>\n" for a, b in facts)
    shown = "".join(
        f'<div class="wide"><img alt="{escape(what)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>\n'
        for what, png in pictures
    )
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<dl>\n{said}</dl>\n{shown}"
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n'
        "</table></div>\n</body>\n</html>\n"
    )
