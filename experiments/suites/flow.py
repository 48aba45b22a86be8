"""The page that shows how information moved through a prompt, and the server that cuts reads."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from transformer.insight import without_reads
from transformer.insight.plot import strong, token_texts

PAGE = Path(__file__).with_suffix(".html")
LEAST, MOST = 0.01, 500  # share of the strongest read that a read is kept from, and reads of each
SHOWN, CUT = 0.1, 10  # share from which a read is shown at first, and how many of those are cut
PROBABILITIES = "probability", "lens_probability", "cut_probability"


def page(found, cuts: dict, tokenizer, served: bool = False) -> str:
    """The page: one file of HTML, with its data in it.

    Args:
      found: a `Flow`.
      cuts: what `cut_reads` gave.
      tokenizer: that of the model.
      served: whether a server will cut other reads too.
    """
    plain = lambda x: json.loads(json.dumps(np.asarray(x, np.float64).tolist()), parse_float=short)
    cut_ids = (token for answer in cuts.values() for token, _ in answer)
    ids = {*np.ravel(found.predicted), *np.ravel(found.cut_predicted), *np.ravel(found.lens)}
    ids = sorted({*map(int, ids), *cut_ids})
    data = {
        "texts": token_texts(tokenizer, found.tokens),
        "names": dict(zip(ids, token_texts(tokenizer, ids), strict=True)),
        "served": served,
        "predicted": found.predicted.tolist(),
        "lens": found.lens.tolist(),
        "layers": found.layers,
        "states": found.states,
        "cut_predicted": found.cut_predicted.tolist(),
        "cut_reads": {" ".join(map(str, read)): answer for read, answer in cuts.items()},
        **{name: plain(getattr(found, name)) for name in PROBABILITIES},
        "reads": [
            [(*at, short(weight)) for *at, weight in strong(edges, LEAST)[:MOST]]
            for edges in np.asarray(found.edges)
        ],
    }
    # In a script "</" could end it.
    return PAGE.read_text().replace('"DATA"', json.dumps(data).replace("</", "<\\/"), 1)


def short(number: float | str) -> float:
    """A number to five digits."""
    return float(f"{float(number):.5g}")


def cut_reads(f, params, cache, found) -> dict:
    """Each of the strongest reads cut: {(block, reader, cell): [(token, probability)] after each}.

    They are the strongest behind each prediction, of blocks where a single read can be cut.
    """
    every = {
        tuple(read): None  # in order, each once
        for edges in np.asarray(found.edges)
        for *read, _ in [x for x in strong(edges, SHOWN) if x[0] not in found.states][:CUT]
    }
    return without(f, params, cache, found, list(every)) if every else {}


def without(f, params, cache, found, reads) -> dict:
    """As `cut_reads`, of these reads."""
    predicted, probability = (x.tolist() for x in without_reads(f, params, cache, found, reads))
    answers = [
        list(zip(x, map(short, p), strict=True))
        for x, p in zip(predicted, probability, strict=True)
    ]
    return dict(zip(reads, answers, strict=True))


def server(f, params, cache, found, html: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, on this machine only; port 0 takes any that is free."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200 if self.path == "/" else 404, "text/html; charset=utf-8", html)

        def do_POST(self):
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                read = tuple(int(asked[name]) for name in ("block", "query", "cell"))
                [answer] = without(f, params, cache, found, [read]).values()
            except (ValueError, KeyError, TypeError) as error:
                return self._send(400, "text/plain; charset=utf-8", str(error))
            return self._send(200, "application/json", json.dumps(answer))

        def _send(self, status, kind, text):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
