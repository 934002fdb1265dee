"""The documentation: its code runs, its API pages are complete, its links resolve."""

import importlib
import re
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CODE_PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
LINK_PAGES = [
    *CODE_PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "src/trak/savers/FORMAT.md",
]
ROOMS = [
    "trak",
    "trak.evaluation",
    "trak.gradient_computers",
    "trak.gradient_computers.rules",
    "trak.modelout_functions",
    "trak.pipeline",
    "trak.projectors",
    "trak.savers",
    "trak.score_computers",
    "trak.whitening",
]

_PYTHON = re.compile(r'python( notest| title="[^"]+")?')
_FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,})(?P<info>.*)$")


def fences(text):
    """(info string, first line number, code) of every fenced block."""
    found, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if opened is None and match:
            opened = (match["mark"], match["info"].strip(), number + 1, [])
        elif opened and match and not match["info"].strip() and match["mark"] >= opened[0]:
            found.append((opened[1], opened[2], "\n".join(opened[3]) + "\n"))
            opened = None
        elif opened:
            opened[3].append(line)
    assert opened is None, f"a fence of line {opened[2] - 1} is not closed"
    return found


def prose(text):
    """The text without fenced blocks and code spans."""
    for _, _, code in fences(text):
        text = text.replace(code, "\n")
    return re.sub(r"(`+).*?\1", "", text, flags=re.DOTALL)


def page_id(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("A page uses the network.")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the pages' tensors are tiny; a busy machine makes more slow
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", CODE_PAGES, ids=page_id)
def test_python_blocks_run(page, tmp_path, monkeypatch, offline, one_thread):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"docs_{page.stem}"}
    with torch.random.fork_rng():
        for info, first_line, code in fences(page.read_text(encoding="utf-8")):
            if info == "python":
                # line numbers of a traceback are those of the page
                exec(compile("\n" * (first_line - 1) + code, page, "exec"), namespace)


def test_the_list_that_a_page_shows_is_the_one_that_its_code_prints(
    monkeypatch, tmp_path, capsys, offline, one_thread
):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "errors-of-scores.md"
    (_, _, code), (info, _, shown), *_ = fences(page.read_text(encoding="utf-8"))
    assert info == "text"
    with torch.random.fork_rng():
        exec(compile(code, page, "exec"), {"__name__": "docs_shown"})
    numbers = re.compile(r"\d+(?:\.\d+)?")
    said, printed = (
        [float(number) for number in numbers.findall(text)]
        for text in (shown, capsys.readouterr().out)
    )
    assert said == pytest.approx(printed, rel=0.02)  # digits differ with the machine


def test_fences_name_their_language():
    for page in LINK_PAGES:
        if page.exists():
            for info, line, _ in fences(page.read_text(encoding="utf-8")):
                where = f"{page_id(page)}:{line}: {info!r}"
                assert info, where
                # a misspelt fence would be a block that never runs
                assert not info.startswith("py") or _PYTHON.fullmatch(info), where


def test_code_pages_have_code():
    counted = {
        page.stem: sum(info == "python" for info, _, _ in fences(page.read_text("utf-8")))
        for page in CODE_PAGES
    }
    having = "index quickstart bert custom-tasks evaluation numerics store"
    for name in having.split():
        assert counted[name] > 0, name


@pytest.mark.parametrize("room", ROOMS)
def test_api_pages_name_everything_public(room):
    documented = {
        identifier
        for page in DOCS.glob("api-*.md")
        for identifier in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)
    }
    module = importlib.import_module(room)
    public = {name: getattr(module, name) for name in module.__all__}
    homes = {name: getattr(value, "__module__", "") for name, value in public.items()}
    missing = [
        name
        for name, home in homes.items()
        if not {f"{room}.{name}", f"trak.{name}", room, home} & documented
    ]
    assert missing == []


def test_every_room_with_public_names_is_listed():
    modules = (ROOT / "src/trak").rglob("*.py")
    having = {p for p in modules if re.search(r"(?m)^__all__", p.read_text("utf-8"))}
    listed = {Path(importlib.import_module(room).__file__).resolve() for room in ROOMS}
    assert having == listed


def test_api_identifiers_exist():
    for page in DOCS.glob("api-*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE):
            assert exists(name), f"{page_id(page)}: {name}"


def exists(name):
    parent, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(parent), attribute)


def anchors(page):
    """Anchors of a page's headings, as mkdocs and forges make them."""
    text = page.read_text(encoding="utf-8")
    for _, _, code in fences(text):
        text = text.replace(code, "\n")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", LINK_PAGES, ids=page_id)
def test_relative_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose(text))
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(text))
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose(text), re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page_id(page)}: {target}"
        assert goal.is_relative_to(ROOT), f"{page_id(page)}: {target}"
        if anchor and goal.suffix == ".md":
            assert anchor in anchors(goal), f"{page_id(page)}: {target}"


def test_navigation_lists_every_page():
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(set(listed) - {"FORMAT.md"}) == sorted(p.name for p in DOCS.glob("*.md"))
    included = re.findall(r'^--8<-- "(.*)"$', (DOCS / "format.md").read_text("utf-8"))
    assert [path for path in included if not (ROOT / path).exists()] == []


def test_pages_load_nothing_from_other_hosts():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false\b", config, re.MULTILINE)
    assert re.search(r"^strict: true\b", config, re.MULTILINE)
    assert "http" not in config
