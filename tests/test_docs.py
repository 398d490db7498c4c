"""Every fact that a comment cites stands in docs/facts, and every relative link of a Markdown page leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

FACTS = REPOSITORY / "docs/facts"
TEXT = (".py", ".yaml", ".yml", ".toml", ".md")
# A file of facts, and where sections are cited their numbers: "training.md 2.7, 2.8", "data.md, section 6.1".
NUMBER = r"\d+(?:\.\d+)*"
CITATION = re.compile(rf"([\w./-]*/)?(\w+)\.md(?:\)?,? (?:sections? )?({NUMBER}(?:(?:, | and ){NUMBER})*))?")
# Links, but for images and addresses: [text](path), [text](path#anchor), [text](#anchor).
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def repository_texts() -> list[Path]:
    """Every text file that git tracks or would track, except this one, whose examples cite what does not exist."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [REPOSITORY / name for name in listed.split("\0") if name.endswith(TEXT)]
    return [path for path in paths if path.is_file() and path != Path(__file__).resolve()]


def without_code(markdown: str) -> str:
    """A page without fenced blocks and inline code, which hold neither links nor headings."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))


def sections(markdown: str) -> list[str]:
    """The numbers of its numbered headings, in order: "2.7" of "### 2.7 Orthogonalization"."""
    headings = HEADING.findall(re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return [found[1] for heading in headings if (found := re.match(rf"({NUMBER})\.? ", heading))]


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives its headings; a heading that is there already gets -1, -2, ... behind it."""
    found: list[str] = []
    for heading in HEADING.findall(re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return {slug if (before := found[:i].count(slug)) == 0 else f"{slug}-{before}" for i, slug in enumerate(found)}


def dangling_citations(text: str) -> list[str]:
    """The citations of a text whose file or section is not in docs/facts."""
    wrong = []
    known = {path.stem: sections(path.read_text(encoding="utf-8")) for path in FACTS.glob("*.md")}
    del known["README"]
    for match in CITATION.finditer(text):
        folder, name, numbers = match[1] or "", match[2], re.findall(NUMBER, match[3] or "")
        missing = set(numbers) - set(known.get(name, []))
        # A path to another folder is none of ours, unless it means one of these files.
        if name in known if folder and not folder.endswith("facts/") else missing:
            wrong.append(match[0])
    return wrong


def dangling_links(page: Path) -> list[str]:
    """The relative links of a Markdown page that lead to no file, or to no heading of one."""
    wrong = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


def test_every_cited_fact_is_in_docs() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in repository_texts()}
    wrong = {str(path.relative_to(REPOSITORY)): found for path in texts if (found := dangling_citations(texts[path]))}
    assert wrong == {}
    # The search itself finds what there is: most citations stand in docstrings of tests.
    cited = [match[0] for text in texts.values() for match in CITATION.finditer(text) if match[3]]
    assert len(cited) >= 10


def test_no_code_cites_a_section_without_its_file() -> None:
    """A § names a section of whatever document its writer had at hand; a reader has none."""
    code = [path for path in repository_texts() if path.suffix != ".md"]
    assert [str(path) for path in code if "§" in path.read_text(encoding="utf-8")] == []


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    pages = [path for path in repository_texts() if path.suffix == ".md"]
    assert {REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", FACTS / "README.md"} <= set(pages)
    assert {str(page.relative_to(REPOSITORY)): found for page in pages if (found := dangling_links(page))} == {}


def test_pages_of_docs_that_code_names_exist() -> None:
    named = {
        name
        for path in repository_texts()
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert "docs/architecture.md" in named
    assert [name for name in sorted(named) if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("page", sorted(FACTS.glob("*.md")), ids=lambda page: page.stem)
def test_no_section_number_occurs_twice(page: Path) -> None:
    numbers = sections(page.read_text(encoding="utf-8"))
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "as in training.md 2.16)",
        "training.md 2.7, 2.8, 2.12) and",
        "training.md section 6, check 5.",
        "data.md, section 6.1.",
        "[training.md](training.md), 2.3",
        "docs/facts/evaluate.md 10.2",
        "sites as in model.md of the records",
        "RESULTS.md: 17 to 18 GiB",
    ],
)
def test_a_citation_that_can_be_followed_passes(text: str) -> None:
    assert dangling_citations(text) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("as in training.md 2.99)", "training.md 2.99"),
        ("training.md 2.7, 2.99, 2.12) and", "training.md 2.7, 2.99, 2.12"),
        ("evaluate.md 3 and 99", "evaluate.md 3 and 99"),
        ("data.md, section 66.1.", "data.md, section 66.1"),
        ("[training.md](training.md), 2.99", "training.md), 2.99"),
        ("spec/data.md, section 6.1.", "spec/data.md, section 6.1"),
        ("sampling.md 3.1", "sampling.md 3.1"),
    ],
)
def test_a_dangling_citation_is_told(text: str, told: str) -> None:
    assert dangling_citations(text) == [told]


def test_a_dangling_link_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# Two words, `code`\n\n## 2.7 Step\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n\n[a](other.md#two-words-code) [b](other.md#27-step) [c](#top) [d](other.md#same-1) `[e](f.md)`"
    )
    assert dangling_links(page) == []
    page.write_text("[a](other.md#no-heading) [b](none.md) [c](#top) [d](https://example.org/x) ![e](none.png)")
    assert dangling_links(page) == ["other.md#no-heading", "none.md", "#top"]
