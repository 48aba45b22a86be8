"""The page that shows how information moved through a prompt, and the server that cuts reads."""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from transformer.insight import cut, intervene
from transformer.insight.flow import predictions
from transformer.insight.plot import strong
from transformer.modes.schedule import run

PAGE = Path(__file__).with_suffix(".html")
LEAST, MOST = 0.01, 500  # share of the strongest read that a read is shown from, and reads of each


def texts(tokenizer, tokens) -> list[str]:
    """The text of each token by itself; one that begins or ends a document is named."""
    named = dict.fromkeys(tokenizer.ends, "<end>") | dict.fromkeys(
        tokenizer.document_start, "<begin>"
    )
    return [named[t] if t in named else tokenizer.decode([t]) for t in map(int, tokens)]


def page(found, tokenizer, served: bool = False) -> str:
    """The page of a `Flow`: one file of HTML, with its data in it."""
    plain = lambda x: json.loads(json.dumps(np.asarray(x, np.float64).tolist()), parse_float=short)
    ids = {*np.ravel(found.predicted), *np.ravel(found.cut_predicted), *np.ravel(found.lens)}
    names = dict(zip(map(int, ids), texts(tokenizer, ids), strict=True))
    data = {
        "texts": texts(tokenizer, found.tokens),
        "names": names,
        "served": served,
        "predicted": found.predicted.tolist(),
        "lens": found.lens.tolist(),
        "layers": found.layers,
        "cut_predicted": found.cut_predicted.tolist(),
        **{name: plain(getattr(found, name)) for name in ("probability", "cut_probability")},
        "reads": [
            [(*at, short(weight)) for *at, weight in strong(edges, LEAST)[:MOST]]
            for edges in np.asarray(found.edges)
        ],
    }
    # In a script "</" could end it.
    return PAGE.read_text().replace('"DATA"', json.dumps(data).replace("</", "<\\/"), 1)


def short(number: str) -> float:
    """A number to five digits."""
    return float(f"{float(number):.5g}")


def cut_reads(f, model, cache, tokens):
    """A function (block, query, cell) -> [(token, probability)] after each token, that read cut."""

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
