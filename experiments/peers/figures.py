"""What the peers share: their flags, and how they time and report."""

import json
import statistics
import time

from absl import flags

PROMPT, NEW = 512, 32  # tokens before decoding begins, and tokens decoded

JSON = flags.DEFINE_string("json", None, "File for the figures; printed anyway.")
THREADS = flags.DEFINE_integer("threads", 2, "Threads that the peer may use.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each case.", lower_bound=1)
CASES = flags.DEFINE_list("cases", ["train", "prefill", "decode"], "What to time.")


def timed(call, prepare=lambda: None):
    """Seconds of each repeat of call(prepare()), of which `prepare` is not timed.

    One run comes before that is not counted.
    """
    seconds = []
    for _ in range(REPEATS.value + 1):
        prepared = prepare()
        begin = time.perf_counter()
        call(prepared) if prepared is not None else call()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def report(versions, cases):
    """Prints the rates of cases, and writes them where --json says.

    Args:
      versions: what was run, by name.
      cases: triples (name, tokens of a run, seconds of each run).
    """
    figures = dict(versions)
    for name, tokens, seconds in cases:
        rates = sorted(tokens / s for s in seconds)
        median = statistics.median(rates)
        figures[name] = {
            "tokens_per_second": median,
            "slowest": rates[0],
            "fastest": rates[-1],
        }
        print(f"{name}: {median:.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f})", flush=True)
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(figures, file, indent=1)
