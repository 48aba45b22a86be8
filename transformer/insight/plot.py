"""Pictures of the flow of information: tokens across, blocks upward, one square a cell."""

from collections.abc import Sequence

import numpy as np

from transformer.insight.flow import Flow


def token_texts(tokenizer, tokens) -> list[str]:
    """The text of each token by itself, and the names of special ones, as of the end of a text.

    Bytes that are a part of a character are written as in "\\xe4".
    """
    inside = lambda token: tokenizer.token_bytes(token).decode(errors="backslashreplace")
    return [inside(t) or tokenizer.token(t) or f"#{t}" for t in map(int, tokens)]


def plot_flow(flow: Flow, texts: Sequence[str], position: int = -1, threshold: float = 0.1):
    """Draws through which cells one prediction came, as a Matplotlib figure.

    A notebook shows it where it is the last value of a cell. Tokens after the one whose prediction
    it is had no part in it, and are not shown.

    Args:
      flow: what `flow` gave.
      texts: [T], the text of each token, such as `token_texts` gives.
      position: the token whose prediction is explained, as an index into T.
      threshold: reads weaker than this share of the strongest are left out.
    """
    from transformer.insight.picture import Picture  # here, since Matplotlib takes long to import

    edges = np.asarray(flow.edges)[position]
    blocks, length, _ = edges.shape
    last, row = position % length, 0.7 if blocks <= 8 else 0.4  # inches from block to block
    length = last + 1
    size = max(5, 1.5 + 0.6 * length), 1.8 + row * (blocks + 1)
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.subplots()
    # What a token knows goes up in its own column; reads bring what others know.
    ends = [blocks - 1] * last + [blocks]
    axes.vlines(range(length), 0, ends, color="0.85", linewidth=1, zorder=0)
    for block, reader, cell, weight in strong(edges, threshold):
        color = "tab:blue" if weight > 0 else "tab:orange"
        share = abs(weight) / np.abs(edges).max()
        # What is read goes into the reader's cell of the next block, or into its prediction.
        ends = [cell, reader], [block, block + 1]
        axes.plot(*ends, color=color, linewidth=0.5 + 4 * share, alpha=0.75, zorder=1)
    at = np.meshgrid(np.arange(length), np.arange(blocks))
    owed = np.abs(edges).sum(1)[:, :length]
    colors = owed / (owed.max() or 1)
    axes.scatter(
        *at, c=colors, marker="s", s=90, cmap="Greys", vmin=0, vmax=1, edgecolors="black", zorder=2
    )
    axes.scatter(last, blocks, marker="o", s=90, color="black", zorder=2)
    labels = list(map(label, texts[:length]))
    slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(length), labels, **slanted, parse_math=False)
    axes.set_yticks(range(blocks + 1), [*(f"block {n}" for n in range(blocks)), "prediction"])
    axes.set_xlim(-0.6, length - 0.4)
    axes.set_ylim(-0.6, blocks + 0.6)
    figure.suptitle(
        f"Reads behind the prediction after {labels[-1]} (token {last}):\n"
        "blue for it, orange against it; more was read from darker cells",
        fontsize=10,
        parse_math=False,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def label(text: str, longest: int = 18) -> str:
    """A token's text as a figure can show it: spaces seen, and escaped what the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    escaped = lambda x: x.encode("unicode_escape").decode()
    shown = lambda x: x if x.isprintable() and ord(x) in known else escaped(x)
    text = "".join(map(shown, text)).replace(" ", "\N{MIDDLE DOT}")
    return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def strong(edges, threshold: float):
    """The reads of edges [blocks, T, T] that matter: tuples (block, reader, cell, weight).

    Strongest first; a read matters whose weight is at least `threshold` of the largest.
    """
    edges = np.asarray(edges)
    found = np.argwhere(np.abs(edges) >= max(threshold * np.abs(edges).max(), 1e-12))
    rows = [(*map(int, at), float(edges[tuple(at)])) for at in found]
    return sorted(rows, key=lambda row: -abs(row[-1]))
