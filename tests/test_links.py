"""What people read: its links lead to files that are there."""

import re

import pytest
from conftest import PROJECT

PAGES = sorted(
    path.relative_to(PROJECT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "data/README.md", "tests/README.md")
    for path in PROJECT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def targets(text: str) -> list[str]:
    """The relative links of a page, without what comes after a #."""
    found = [target.partition("#")[0] for target in LINK.findall(CODE.sub("`code`", text))]
    return [target for target in found if target and not re.match(r"[a-z]+:", target)]


def test_links_are_found():
    text = "[a](x.md) ![b](y/z.png) [`c`](w.md#part) [d](#here) [e](https://e.org) `[f](code)`\n```\n[g](block)\n```\n"
    assert targets(text) == ["x.md", "y/z.png", "w.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page):
    path = PROJECT / page
    links = targets(path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_of_the_documentation_can_be_reached_from_the_readme():
    linked = {PROJECT / target for target in targets((PROJECT / "README.md").read_text(encoding="utf-8"))}
    assert set(PROJECT.glob("docs/*.md")) - linked == set()
