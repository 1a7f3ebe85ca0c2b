"""MkDocs hooks that add pages to the site, and a check of the site's links.

mkdocs.yml names this file, and MkDocs calls its functions ``on_...``. They add the pages that are
stored outside of docs/ and the reference. In the Markdown files, links point to files in the
repository, as on GitHub. The hooks change them to links between pages, and copy linked files that
are not pages to the site.

``python docs/build_site.py SITE`` checks the links of a built site. It exits with 1 if a link is
broken.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages that are stored outside of docs/, and their paths on the site.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "examples/recipes/README.md": "recipes.md",
}
# index.md replaces the README on the site.
_PLACES = OUTSIDE | {"README.md": "index.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)")
_INLINE_CODE = re.compile(r"(?<!<pre>)(?<!<pre><span></span>)<code>([^<]+)</code>")
_LONGEST_UNBROKEN_CODE = 30


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, the files that pages link to, and the reference."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / source).read_text("utf-8") for source, page in OUTSIDE.items()}
    for page, text in (made | {"reference.md": _reference()}).items():
        files.append(File.generated(config, page, content=text))
    sources = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    sources |= {page: source for source, page in OUTSIDE.items()}
    for page, source in sources.items():
        if page == "reference.md":
            continue
        for _, target in _LINK.findall((ROOT / source).read_text("utf-8")):
            found = _in_repository(source, target)
            wanted = _place(found)
            if (ROOT / found).is_file() and files.get_file_from_path(wanted) is None:
                content = (ROOT / found).read_bytes()
                files.append(File.generated(config, wanted, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files in the repository by links to their places on the site."""
    uri = page.file.src_uri
    source = next((s for s, p in OUTSIDE.items() if p == uri), f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        found = _in_repository(source, match[2])
        if "://" in match[2] or not (ROOT / found).is_file():
            return match[0]
        target = _place(found)
        return match[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Choose where lines may break in inline code, and keep note marks with their words.

    Short code is not broken. Long code, such as the path of a test, is broken after separators.
    """

    def with_line_breaks(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) <= _LONGEST_UNBROKEN_CODE:
            return f'<code class="short">{code}</code>'
        return "<code>" + re.sub(r"(::|[/_.])", r"\1<wbr>", code) + "</code>"

    return _INLINE_CODE.sub(with_line_breaks, html).replace(" <sup>", "&nbsp;<sup>")


def _in_repository(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _place(path: str) -> str:
    """Return the path on the site of a file in the repository."""
    return _PLACES.get(path, path.removeprefix("docs/"))


def _reference() -> str:
    """Return the Markdown of a page on which mkdocstrings describes each public name."""
    tree = ast.parse((ROOT / "fastlora" / "__init__.py").read_text("utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    pages = [f"fastlora.{name}" for name in names if name not in ("functional", "PeftModel")]
    pages += [f"fastlora.functional.{name}" for name in _functions("functional.py")]
    pages += [f"fastlora.optimizers.{name}" for name in _functions("optimizers/__init__.py")]
    return "# Reference\n\n" + "".join(f"::: {page}\n\n" for page in pages)


def _functions(file: str) -> list[str]:
    """Return the names in a module's ``__all__``, or else its public functions."""
    tree = ast.parse((ROOT / "fastlora" / file).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    found = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return [name for name in found if not name.startswith("_")]


class _Page(HTMLParser):
    """The IDs on a page, and the targets of its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links = set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """Return each link on a built site whose file or ID does not exist."""
    pages = {path: _Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # The error page is served at any path, so its links begin with a slash.
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            ids = pages[target].ids if target in pages else None
            lost = ids is not None and parts.fragment and unquote(parts.fragment) not in ids
            if not target.is_file() or lost:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def main() -> int:
    """Check the links of the site that the command line names."""
    site = Path(sys.argv[1]).resolve()
    broken, count = broken_links(site), len(list(site.rglob("*.html")))
    sys.stdout.write("".join(f"broken link in {line}\n" for line in broken))
    sys.stdout.write(f"{count} pages, {len(broken)} broken links\n")
    return int(bool(broken) or count == 0)


if __name__ == "__main__":
    sys.exit(main())
