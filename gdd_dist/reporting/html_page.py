"""report.html: report.md and its pictures in one file that needs no network, for wide and narrow screens."""

import base64
import re
from collections.abc import Mapping

import markdown

CSS = """
:root { color-scheme: light dark; --line: #d8dce2; --soft: #f4f6f8; --text: #1d2330; --back: #ffffff; --link: #2f5d8f; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a414d; --soft: #20262f; --text: #e3e7ee; --back: #14181e; --link: #8ab4e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem clamp(.8rem, 3vw, 2.5rem) 4rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .6rem 0 1rem; }
h1 + p { font-size: 1.15rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, li { max-width: 62rem; }
nav { font-size: .92rem; margin: .4rem 0 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
a { color: var(--link); }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; background: #ffffff; border-radius: 4px; }
.scroll { overflow-x: auto; max-width: 100%; margin: 1rem 0; }
.scroll img { margin: 0; }
figure { max-width: 32rem; margin: 1rem 0; } figure svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
.names td, .names th { white-space: normal; }
th { background: var(--soft); font-weight: 600; } th:first-child { text-align: left; }
tr.matched td { background: color-mix(in srgb, #c8553d 9%, transparent); }
pre { background: var(--soft); padding: .8rem 1rem; overflow: auto; max-height: 28rem; border-radius: 4px; font-size: .85rem; line-height: 1.4; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .scroll img { max-width: none; width: 40rem; }
  table { font-size: .74rem; } th, td { padding: .3rem .26rem; }
  th:first-child, td:first-child { position: sticky; left: 0; white-space: normal; } td:first-child { background: var(--back); }
  body { font-size: 15px; } h1 { font-size: 1.45rem; } h1 + p { font-size: 1.05rem; } }
@page { margin: 15mm; }
@media print {
  :root { color-scheme: light; --line: #c8ccd2; --soft: #f4f6f8; --text: #000000; --back: #ffffff; --link: #000000; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } h2 { break-after: avoid; }
  img, figure, tr { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  pre { max-height: none; white-space: pre-wrap; } }
"""
NAME_SPACE = ' xmlns="http://www.w3.org/2000/svg"'


def html(text: str, pictures: Mapping[str, bytes]) -> str:
    """Convert a Markdown text to a page. ``pictures``: file name → PNG or SVG, which replaces ``![…](name)``.

    Raises KeyError for a missing picture.
    """
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"], output_format="html")
    body = re.sub(r'src="([\w.-]+\.png)"', lambda m: f'src="{_data_uri(pictures[m[1]])}"', body)
    body = re.sub(r'<p><img [^>]*src="([\w.-]+\.svg)"[^>]*></p>', lambda m: _inline(pictures[m[1]]), body)
    body = re.sub(r"<p>(<img [^>]*>)</p>", r'<div class="scroll">\1</div>', body)
    body = re.sub(r"<table>(.*?)</table>", _table, body, flags=re.DOTALL)
    body = body.replace("<tr>\n<td>matched</td>", '<tr class="matched">\n<td>matched</td>')
    found = re.search(r"<h1[^>]*>(.*?)</h1>", body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{found[1] if found else 'Report'}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{_with_contents(body)}\n</body>\n</html>\n"
    )


def _inline(svg: bytes) -> str:
    """Return an SVG as a part of the page, so that it follows the page's colours; in HTML it needs no namespace."""
    return f"<figure>{svg.decode().replace(NAME_SPACE, '')}</figure>"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(match: re.Match[str]) -> str:
    """Let a wide table scroll instead of the page; a table of two columns wraps."""
    columns = match[1].partition("</tr>")[0].count("<th")
    return f'<div class="scroll{" names" if columns <= 2 else ""}"><table>{match[1]}</table></div>'


def _with_contents(body: str) -> str:
    """Add links to the sections after the first paragraphs."""
    sections = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body)
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in sections)
    head, mark, rest = body.partition("<h2")
    return f"{head}<nav>{links}</nav>\n{mark}{rest}" if sections else body
