"""The page of a prompt's flow: written, shown by a browser where there is one, and served."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from html.parser import HTMLParser

import pytest

from experiments.suites.flow import cut_reads, page, server
from transformer.data.tokenizer import byte_tokenizer
from transformer.insight import flow
from transformer.program.init import init_cache
from transformer.program.program import program
from transformer.storage.model import load

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    import jax

    from transformer import Model, init_params, presets, save

    path = tmp_path_factory.mktemp("flow") / "model"
    config = presets["tiny"]
    save(Model(config, init_params(config, jax.random.key(0)), byte_tokenizer()), path)
    return path


@pytest.fixture(scope="module")
def served(workdir):
    """A running server: -> (its address, the page)."""
    model = load(workdir)
    tokens = [model.tokenizer.end_of_document, *model.tokenizer.encode("</a>")]
    given = program(model.config), model.params, init_cache(model.config, len(tokens))
    found = flow(*given, tokens)
    html = page(found, cut_reads(*given, found), model.tokenizer, served=True)
    with server(*given, found, html, port=0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/", html
        http.shutdown()


def test_it_writes_pictures_and_a_page(run_program, workdir, tmp_path):
    flags = f"--model={workdir}", "--prompt=ab", f"--out={tmp_path}"
    result = run_program("experiments.flow", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "flow.svg").read_text()
    html = (tmp_path / "flow.html").read_text()
    assert "DATA" not in html


def test_the_page_stands_alone_and_holds_its_data(served):
    _, html = served
    assert not re.findall(r"""(?:src|href)=["']""", html) and "import(" not in html
    HTMLParser().feed(html)
    [data] = re.findall(r'type="application/json">(.*?)</script>', html, re.DOTALL)
    data = json.loads(data)
    assert data["texts"] == ["<|endoftext|>", "<", "/", "a", ">"]
    assert len(data["reads"]) == 5 and all(data["reads"])
    for t, reads in enumerate(data["reads"]):
        assert all(block < 2 and cell <= reader <= t for block, reader, cell, _ in reads)
    assert {str(x) for x in data["predicted"]} <= data["names"].keys()
    strongest = " ".join(map(str, data["reads"][4][0][:3]))
    assert len(data["cut_reads"][strongest]) == 5
    for word in ("aria-live", "aria-label", "aria-pressed", "focus-visible", "ArrowLeft"):
        assert word in html


def test_the_server_cuts_reads(served):
    address, html = served
    assert urllib.request.urlopen(address).read().decode() == html
    body = json.dumps({"block": 1, "query": 3, "cell": 1}).encode()
    with urllib.request.urlopen(f"{address}cut", data=body) as answer:
        found = json.load(answer)
    assert len(found) == 5 and all(0 < probability <= 1 for _, probability in found)
    later = json.dumps({"block": 1, "query": 1, "cell": 3}).encode()
    for wrong in (b"{}", later):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{address}cut", data=wrong)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to show the page")
def test_a_browser_shows_it(served, tmp_path):
    """The script runs: every token and cell is a button with a name, and lines are drawn."""
    address, _ = served
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command = [BROWSER, *flags, "--virtual-time-budget=3000", "--dump-dom", address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    buttons = re.findall(r"<button[^>]*>", result.stdout)
    assert len([x for x in buttons if 'class="cell"' in x and "aria-label=" in x]) == 2 * 5
    assert len([x for x in buttons if 'aria-pressed="true"' in x]) == 2  # with its prediction
    assert len([x for x in buttons if 'tabindex="0"' in x]) == 1  # arrows lead to the others
    assert "<path" in result.stdout and "After token 4" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a", "--out=x"], "give one of --workdir=DIR and --model=PATH"),
        (
            ["--model=nowhere", "--prompt=a", "--out=x"],
            "neither a saved model nor a work",
        ),
    ],
)
def test_wrong_use_is_one_line(run_program, flags, message):
    result = run_program("experiments.flow", *flags)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
