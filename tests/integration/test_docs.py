"""Test every page of the documentation: snippets run, commands parse, links lead somewhere.

Blocks of a page share a namespace and run in order, in an empty folder:

    ```python   is executed; an ```output block after it is what it prints
    ```py       is part of a file, and not executed
    ```pycon    is a doctest, the errors in it too; a warning is printed as "UserWarning: ..."
    ```sh       its `python -m sdgp_fx` and `python -m benchmarks...` are parsed, not run
"""

import argparse
import contextlib
import doctest
import importlib
import importlib.util
import io
import itertools
import logging
import re
import runpy
import shlex
import warnings
from pathlib import Path

import pytest

import sdgp_fx
from sdgp_fx import config
from sdgp_fx.passes import prune_input_grads

pytest.importorskip("timm", reason="needs timm")
MarkdownIt = pytest.importorskip("markdown_it", reason="needs markdown-it-py").MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
every_page = pytest.mark.parametrize("page", PAGES)


def parse(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(text):
    """Return the fenced blocks of a page: (language, content, number of its first line)."""
    fences = [token for token in parse(text) if token.type == "fence"]
    return [(token.info.split(" ")[0], token.content, token.map[0] + 1) for token in fences]


def run_blocks(text, name):
    """Run the python and pycon blocks of a page."""
    namespace, printed = {"__name__": "__main__"}, None
    for language, content, line in blocks(text):
        if language == "output":
            assert printed is not None, f"{name}:{line}: output of no python block"
            assert printed == content, f"{name}:{line}"
        printed = None
        if language == "python":
            code = compile("\n" * line + content, name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif language == "pycon":
            run_doctest(content, namespace, name, line)


def run_doctest(content, namespace, name, line):
    test = doctest.DocTestParser().get_doctest(content, namespace, name, name, line)
    assert test.examples, f"{name}:{line}: no example"
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    result = runner.run(test, out=report.write, clear_globs=False)
    namespace.update(test.globs)
    assert result.failed == 0, report.getvalue()


class Parsed(BaseException):
    """Raised to end a command once its arguments are parsed."""


def commands(text):
    """Yield module and arguments of every command of the package and benchmarks in sh blocks."""
    for language, content, _ in blocks(text):
        for line in content.replace("\\\n", " ").splitlines() if language == "sh" else ():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            for i, word in enumerate(words[:-1]):
                if word == "-m" and words[i + 1].partition(".")[0] in ("sdgp_fx", "benchmarks"):
                    rest = words[i + 2 :]
                    end = next((j for j, w in enumerate(rest) if w[0] in ";&|<>"), len(rest))
                    yield words[i + 1], rest[:end]


def parse_command(module, arguments, monkeypatch):
    """Let the real parser of a module read the arguments, and do no more."""
    if importlib.util.find_spec(module).submodule_search_locations:
        module += ".__main__"
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises((Parsed, SystemExit)) as ended:
        importlib.import_module(module).main(arguments)
    assert getattr(ended.value, "code", 0) == 0, f"{module} {arguments}"  # 0 is --help's.


def links(text):
    """Yield the targets of the links and pictures of a page, without those on other sites."""
    for token in parse(text):
        for part in (token, *(token.children or ())):
            if part.type in ("html_block", "html_inline"):
                found = re.findall(r"""(?:href|src|srcset)=["']([^"']*)""", part.content)
            else:
                found = [part.attrs[name] for name in ("href", "src") if name in part.attrs]
            yield from (target for target in found if not re.match(r"[a-z]+:", target))


def anchors(text):
    """Return the fragments by which GitHub knows the headings of a page."""
    tokens = parse(text)
    titles = [
        "".join(part.content for part in content.children)
        for heading, content in itertools.pairwise(tokens)
        if heading.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    """Return the links of a page that lead nowhere."""
    return [target for target in links(page.read_text()) if not leads_somewhere(page, target)]


def leads_somewhere(page, target):
    path, _, fragment = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not (file.is_relative_to(ROOT) and file.exists()):
        return False
    return not fragment or fragment in anchors(file.read_text())


@pytest.fixture
def _empty_folder(tmp_path, monkeypatch):
    """Run the snippets in an empty folder, by default with aot_eager, which needs no C++ compiler.

    The environment doesn't set this default, because error messages show the environment.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sdgp_fx.SDGPConfig.__init__.__kwdefaults__, "inner", "aot_eager")
    # A page adds to these.
    monkeypatch.setattr(config, "TARGETS", config.TARGETS)
    monkeypatch.setattr(prune_input_grads, "FINDERS", dict(prune_input_grads.FINDERS))

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"{category.__name__}: {message}")

    log = logging.getLogger("sdgp_fx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        monkeypatch.setattr(warnings, "showwarning", show)
        yield
    log.setLevel(level)


@every_page
@pytest.mark.usefixtures("_empty_folder")
def test_snippets_run(page):
    run_blocks(PAGES[page].read_text(), page)


@every_page
def test_commands_parse(page, monkeypatch):
    for module, arguments in commands(PAGES[page].read_text()):
        with monkeypatch.context() as patch:
            parse_command(module, arguments, patch)


@every_page
def test_links_lead_somewhere(page):
    assert broken_links(PAGES[page]) == []


def test_pictures_are_drawn_by_the_script(tmp_path):
    """All pictures of the folder are drawn; how they look is not compared."""
    folder = ROOT / "docs" / "pictures"
    runpy.run_path(str(folder / "draw.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn
    assert drawn <= {path.name for path in folder.glob("*.png")}


TRACEBACK = "Traceback (most recent call last):"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nprint(1)\n```\n\n```output\n2\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\ny\n```\n", NameError),
        ("```pycon\n>>> 1 + 1\n3\n```\n", AssertionError),
        (f"```pycon\n>>> int('x')\n{TRACEBACK}\nValueError: y\n```\n", AssertionError),
        ("```pycon\nprint(1)\n```\n", AssertionError),
    ],
)
def test_a_wrong_snippet_is_found(text, error):
    with pytest.raises(error):
        run_blocks(text, "page")


@pytest.mark.parametrize(
    "line",
    [
        "python -m benchmarks.traffic --models resnet18",
        "cd x && SDGP_N=1 python -m benchmarks.traffic --size big | tee log",
        "python -m sdgp_fx demmo",
        "python -m benchmarks.no_such",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
    ((module, arguments),) = commands(f"```sh\n{line}\n```\n")
    with pytest.raises((AssertionError, AttributeError)):
        parse_command(module, arguments, monkeypatch)


def test_a_wrong_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `title`, of two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-title-of-two) [c](https://x.org/y) [d](#here)\n\n# Here\n\n"
        "[e](none.md) [f](other.md#title) ![g](none.png) [h](../..) [i](#there)\n\n"
        '<img src="none.svg">\n'
    )
    wrong = ["none.md", "other.md#title", "none.png", "../..", "#there", "none.svg"]
    assert broken_links(page) == wrong
