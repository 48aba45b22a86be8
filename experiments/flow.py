"""How information moved through a prompt: pictures, and a page to explore.

    python -m experiments.flow --workdir=runs/demo --prompt='def read(self' --out=flow
    python -m experiments.flow --workdir=runs/demo --prompt='def read(self' --out=flow --serve=8000
    python -m experiments.flow --model=SmolLM2.gguf --prompt='The capital of France is' --out=flow

It writes flow.png, flow.svg and flow.html, one page that needs no network. Tokens go across and
blocks upward, one square a cell. On the page, choose a token to see through which cells its
prediction came, and a cell to cut it off from all queries; the strongest reads can be cut one by
one. With --serve the page comes from a small server on this machine, which also cuts the others.
"""

from pathlib import Path

from absl import flags

from experiments.run import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_MODEL = flags.DEFINE_string("model", None, "Instead: any model that `transformer.load` takes.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text that is looked into.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory for the files.", required=True)
_SERVE = flags.DEFINE_integer("serve", None, "Port of 127.0.0.1 to serve the page on.")
MOST = 64  # tokens: the page has a square for each, and a run for each cell that is cut


def main(argv):
    del argv
    source = cli.one_of({"DIR": _WORKDIR, "PATH": _MODEL})

    from experiments.suites.flow import cut_reads, page, server
    from transformer.insight import flow, plot_flow, token_texts
    from transformer.program.init import init_cache
    from transformer.program.program import program
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        model = load(source.value)
        tokens = [*model.tokenizer.document_start, *model.tokenizer.encode(_PROMPT.value)]
        most = min(MOST, model.config.max_length)
        if len(tokens) > most:
            cli.fail(f"--prompt has {len(tokens)} tokens; at most {most} can be shown.")
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        f, cache = program(model.config), init_cache(model.config, len(tokens))
        found = flow(f, model.params, cache, tokens)
        figure = plot_flow(found, token_texts(model.tokenizer, tokens))
        for name in ("flow.png", "flow.svg"):
            figure.savefig(out / name, dpi=150)
        cuts = cut_reads(f, model.params, cache, found)
        (out / "flow.html").write_text(page(found, cuts, model.tokenizer))
    print(f"wrote flow.png, flow.svg and flow.html in {out}")
    if _SERVE.value is not None:
        html = page(found, cuts, model.tokenizer, served=True)
        given = f, model.params, cache, found, html, _SERVE.value
        with cli.user_errors(OSError), server(*given) as http:
            serve(http)


def serve(http):
    """Serves the page until it is interrupted."""
    print(f"http://127.0.0.1:{http.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        http.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    cli.start(main)
