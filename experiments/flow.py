"""How information moved through a prompt: pictures, and a page to explore.

    python -m experiments.flow --workdir=runs/demo --prompt='def read(self' --out=flow
    python -m experiments.flow --workdir=runs/demo --prompt='def read(self' --out=flow --serve=8000

It writes flow.png, flow.svg and flow.html, one page that needs no network. Tokens go across and
blocks upward, one square a cell. On the page, choose a token to see through which cells its
prediction came, and a cell to cut it off from all queries. With --serve the page comes from a small
server on this machine, which also cuts single reads.
"""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from absl import flags

from experiments.run import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_MODEL = flags.DEFINE_string("model", None, "A saved model; the same as --workdir.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text that is looked into.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory for the files.", required=True)
_SERVE = flags.DEFINE_integer("serve", None, "Port of 127.0.0.1 to serve the page on.")
PAGE = Path(__file__).with_suffix(".html")
NUMBERS = "probability", "cut_probability", "edges"  # of a `Flow`, shown to five digits
MOST = 64  # tokens: the page has a square for each, and a run for each cell that is cut


def main(argv):
    del argv
    if (_WORKDIR.value is None) == (_MODEL.value is None):
        cli.fail("give one of --workdir=DIR and --model=PATH.")

    from transformer.insight import flow, plot_flow
    from transformer.program.init import init_cache
    from transformer.program.program import program
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        model = load(_WORKDIR.value or _MODEL.value)
        tokens = [model.tokenizer.end_of_document, *model.tokenizer.encode(_PROMPT.value)]
        most = min(MOST, model.config.max_length)
        if len(tokens) > most:
            cli.fail(f"--prompt has {len(tokens)} tokens; at most {most} can be shown.")
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        f, cache = program(model.config), init_cache(model.config, len(tokens))
        found = flow(f, model.params, cache, tokens)
        figure = plot_flow(found, texts(model.tokenizer, tokens))
        for name in ("flow.png", "flow.svg"):
            figure.savefig(out / name, dpi=150)
        (out / "flow.html").write_text(page(found, model.tokenizer))
    print(f"wrote flow.png, flow.svg and flow.html in {out}")
    if _SERVE.value is not None:
        serve(f, model, cache, tokens, page(found, model.tokenizer, served=True))


def texts(tokenizer, tokens) -> list[str]:
    """The text of each token by itself; the one that begins a document is named."""
    end = tokenizer.end_of_document
    return ["<begin>" if t == end else tokenizer.decode([t]) for t in map(int, tokens)]


def page(found, tokenizer, served: bool = False) -> str:
    """The page of a `Flow`: one file of HTML, with its data in it."""
    import numpy as np

    plain = lambda x: json.loads(json.dumps(np.asarray(x, np.float64).tolist()), parse_float=short)
    ids = {*np.ravel(found.predicted), *np.ravel(found.cut_predicted), *np.ravel(found.lens)}
    names = dict(zip(map(int, ids), texts(tokenizer, ids), strict=True))
    data = {
        "texts": texts(tokenizer, found.tokens),
        "names": names,
        "served": served,
        "predicted": found.predicted.tolist(),
        "lens": found.lens.tolist(),
        "cut_predicted": found.cut_predicted.tolist(),
        **{
            name: plain(getattr(found, name))
            for name in ("probability", "cut_probability", "edges")
        },
    }
    # In a script "</" could end it.
    return PAGE.read_text().replace('"DATA"', json.dumps(data).replace("</", "<\\/"), 1)


def short(number: str) -> float:
    """A number to five digits."""
    return float(f"{float(number):.5g}")


def cut_reads(f, model, cache, tokens):
    """A function (block, query, cell) -> [(token, probability)] after each token, that read cut."""
    import jax
    import jax.numpy as jnp

    from transformer.insight import cut, intervene
    from transformer.insight.flow import predictions
    from transformer.modes.schedule import run

    @partial(jax.jit, static_argnums=1)
    def compute(params, block, query, cell):
        g = intervene(f, [cut(block, query, cell)])
        return predictions(run(g, params, cache, jnp.asarray(tokens))[1])

    def answer(block, query, cell):
        pairs = compute(model.params, int(block), jnp.int32(query), jnp.int32(cell))
        return list(zip(*(x.tolist() for x in pairs), strict=True))

    return answer


def server(f, model, cache, tokens, html: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, on this machine only; port 0 takes any that is free."""
    answer = cut_reads(f, model, cache, tokens)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200 if self.path == "/" else 404, "text/html; charset=utf-8", html)

        def do_POST(self):
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = answer(asked["block"], asked["query"], asked["cell"])
            except (ValueError, KeyError, TypeError) as error:
                return self._send(400, "text/plain; charset=utf-8", str(error))
            return self._send(200, "application/json", json.dumps(found))

        def _send(self, status, kind, text):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(f, model, cache, tokens, html: str):
    """Serves the page until it is interrupted."""
    with cli.user_errors(OSError), server(f, model, cache, tokens, html, _SERVE.value) as http:
        print(f"http://127.0.0.1:{http.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            http.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    cli.start(main)
