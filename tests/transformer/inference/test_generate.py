"""Generation against the parallel mode, batches against single prompts, and what is compiled."""

import inspect
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.decode import State, capacity_for, decode
from transformer.inference.generate import generate, stream
from transformer.inference.prefill import Prefill, run_chunks
from transformer.inference.prepare import cast_params
from transformer.inference.rows import Rows
from transformer.inference.sampling import Sampling
from transformer.inference.score import score
from transformer.modes.schedule import run
from transformer.program.init import init_cache, init_params
from transformer.program.linear import Linear
from transformer.program.program import program
from transformer.storage.model import Model

TOKENIZER = byte_tokenizer()
END = TOKENIZER.end_of_document
SMALL = Config(
    vocab_size=300,
    max_length=256,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=False,
)
# Most tests run this one, with 1 or 5 prompts, so that little is compiled.
RINGS = SMALL.replace(window=(24, None), scan_layers=True)
# A convolution, a state and keys and values: every form that a block has.
HYBRID = SMALL.replace(layer_kinds=("delta", "attention"), window=(24, None))
SCANNED = HYBRID.replace(num_layers=4, scan_layers=True)
CONFIGS = {
    "rings in scanned layers": RINGS,
    "learned positions, a window longer than a chunk": SMALL.replace(
        positions="learned", norm="layer", biases="all", feed_forward="gelu", window=100
    ),
}
LENGTHS = (1, 5, 64, 66, 140)  # no chunk of the prefill, one, exactly one, two, three


@cache
def model(config):
    # At 10 times the usual size of matrices, tokens depend on all of their context.
    params = init_params(config, jax.random.key(config.num_layers))
    widen = lambda x: 10 * x if x.ndim > 1 and min(x.shape) > 2 else x
    return Model(config, jax.tree.map(widen, params), TOKENIZER)


@pytest.fixture
def prompts(rng):
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


@cache
def reciter(text):
    """A model whose tokens follow each other as in a text of distinct bytes, and then end."""
    chain = [*text.encode(), END]
    config = RINGS
    params = jax.tree.map(jnp.zeros_like, model(config).params)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(config.vocab_size, config.width)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    output = np.zeros((config.width, config.vocab_size), np.float32)
    output[:, chain[1:]] = 20 * embedding[chain[:-1]].T
    params = params.replace(
        embedding=jnp.asarray(embedding),
        output=Linear(jnp.asarray(output)),
        final_norm=params.final_norm.replace(scale=jnp.ones(config.width)),
    )
    return Model(config, params, TOKENIZER)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "top_k": 100}])
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(prompts, config, sampling):
    options = {"max_new_tokens": 40, "seed": len(prompts[0])} | sampling
    together = generate(model(config), prompts, **options)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = generate(model(config), [prompt], **options)
        assert completion.tokens == alone.tokens and completion.text == alone.text
        # Other shapes of matrix products round float32 logits differently.
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=1e-4)
    # Greedily, two may come to repeat the same.
    assert len({tuple(completion.tokens) for completion in together}) > 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generation_is_the_argmax_of_the_parallel_mode(prompts, config):
    m, f = model(config), program(config)
    parallel = jax.jit(lambda tokens: run(f, m.params, init_cache(config, len(tokens)), tokens)[1])
    completions = generate(m, prompts, max_new_tokens=40, temperature=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        written = prompt + completion.tokens
        logits = parallel(np.pad(written, (0, config.max_length - len(written))))
        logits = np.asarray(logits)[len(prompt) - 1 : len(written) - 1]
        at = np.arange(len(logits)), completion.tokens
        # The largest, or a tie with it to the rounding of float32.
        assert (logits[at] >= logits[:, : TOKENIZER.vocab_size].max(axis=1) - 1e-4).all()
        expected = np.asarray(jax.nn.log_softmax(logits))[at]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_bfloat16_casts_matrices_once_and_agrees_with_the_parallel_mode(prompts):
    # All experts for every token: one that goes to others in one mode, since its best are nearly
    # alike, is another function of the tokens (one prompt in 40 was 0.35 apart).
    config = SMALL.replace(dtype="bfloat16", num_experts=4, experts_per_token=4)
    params = cast_params(config, model(config).params)
    layer = params.layers[0]
    assert params.embedding.dtype == layer.mixer.query.weight.dtype == jnp.bfloat16
    assert layer.feed_forward.up.weight.dtype == jnp.bfloat16
    assert params.final_norm.scale.dtype == layer.mixer_norm.scale.dtype == jnp.float32
    prompt = prompts[3]
    [completion] = generate(model(config), [prompt], max_new_tokens=30, seed=1)
    expected = score(model(config), prompt + completion.tokens)[len(prompt) - 1 :]
    # bfloat16 has 8 bits: logits of up to about 10 differ by a few times 10 / 256.
    np.testing.assert_allclose(completion.logprobs, expected, atol=0.25)


def test_other_lengths_and_parameters_compile_nothing(prompts):
    compiled = []
    record = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(record)
    config = SMALL.replace(num_layers=1)
    short, long = "a prompt", prompts[-1]
    generate(model(config), [short], max_new_tokens=3)
    assert compiled
    compiled.clear()
    generate(model(config), [long], max_new_tokens=50)
    generate(model(config), [long], max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.9, seed=7)
    generate(model(config), ["ab"], max_new_tokens=200, temperature=0, min_p=0.1, stop=["x", 7])
    list(stream(model(config), [short], max_new_tokens=5))
    assert not compiled


def test_another_capacity_compiles_once():
    compiled = []
    record = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(record)
    config = SMALL.replace(num_layers=1, max_length=1024)
    generate(model(config), [[65] * 20], max_new_tokens=3)
    compiled.clear()
    generate(model(config), [[65] * 500], max_new_tokens=12)  # all of the 512 cells
    assert not compiled
    generate(model(config), [[65] * 501], max_new_tokens=12)
    assert compiled
    compiled.clear()
    generate(model(config), [[65] * 700], max_new_tokens=68)  # all of the 768
    generate(model(config), [[65] * 9], max_new_tokens=3)
    assert not compiled


@given(num_tokens=st.integers(1, 2**20))
def test_capacities_are_few_and_fit(num_tokens):
    capacity = capacity_for(num_tokens)
    assert num_tokens <= capacity <= max(512, 1.5 * num_tokens)
    assert capacity_for(capacity) == capacity and capacity % 64 == 0
    assert len({capacity_for(n) for n in range(1, 2**14, 63)}) == 11


def phases(config, rows, capacity):
    """Prefill and decode loop, not yet compiled, and the cache."""
    f = program(config)
    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    scalar, per_row = shape((), jnp.int32), shape((rows,), jnp.int32)
    stack = lambda x: jnp.zeros((rows, *x.shape), x.dtype)
    cache = jax.eval_shape(lambda: jax.tree.map(stack, init_cache(config, capacity)))
    chunks = shape((rows, capacity), jnp.int32), per_row, shape((2,), jnp.int32)
    state = State(cache, per_row, per_row, shape((rows, 2), jnp.uint32))
    stop_ids, running = shape((8,), jnp.int32), shape((rows,), jnp.bool_)
    arguments = (f, params, state, running, Sampling.make(), stop_ids, scalar)
    return run_chunks.lower(f, params, cache, *chunks, size=64), decode.lower(*arguments), cache


@pytest.mark.parametrize(
    "config, rows",
    [(SMALL, 1), (RINGS, 3), (SMALL, 3), (HYBRID, 3), (SCANNED, 1)],
)
def test_compiled_loops_compute_and_copy_only_what_they_need(compiled_text, config, rows):
    *lowered, cache = phases(config, rows, capacity=512)
    prefill, decode = map(compiled_text, lowered)
    dots = lambda text: [line for line in text.splitlines() if re.search(r"\bdot\(|gemm", line)]
    with_vocabulary = lambda text: [
        line for line in dots(text) if re.search(r"[\[,]300[,\]]", line)
    ]
    assert dots(prefill) and not with_vocabulary(prefill)
    assert with_vocabulary(decode)
    assert " scatter(" not in decode
    copied = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", decode)
    }
    assert not copied & {x.shape for x in jax.tree.leaves(cache)}
    assert "input_output_alias" in decode  # the cache is updated where it lies


def test_the_randomness_of_a_sample():
    def draw(prompts, seed):
        completions = generate(model(RINGS), prompts, max_new_tokens=20, seed=seed)
        return [tuple(completion.tokens) for completion in completions]

    prompts = ["abc", "abc", "abcd", "x", "x"]
    first = draw(prompts, 3)
    assert first == draw(prompts, 3)  # the same seed, the same samples
    others = draw(["x", "abcd", "y", "abc", "abc"], 3)
    assert [others[n] for n in (3, 4, 1, 0)] == first[:4]  # other prompts, and their order
    assert len(set(first)) == 5  # repeated prompts differ
    assert not set(first) & set(draw(prompts, 4))


def test_every_step_draws_anew_and_only_ids_of_the_tokenizer(rng):
    blank = Model(RINGS, jax.tree.map(jnp.zeros_like, model(RINGS).params), TOKENIZER)
    seed = int(rng.integers(2**32))
    for completion in generate(blank, ["a"] * 5, max_new_tokens=40, seed=seed):
        # Of 40 equal draws out of 257 about 3 are repeats.
        assert len(set(completion.tokens)) >= 0.7 * len(completion.tokens)
        assert max(completion.tokens) < TOKENIZER.vocab_size
        # All 300 logits are 0, to the rounding of float32.
        np.testing.assert_allclose(completion.logprobs, -np.log(300), rtol=1e-6)


def test_completions_end():
    m = reciter("abcdefghij")

    def complete(prompt, **options):
        [completion] = generate(m, [prompt], temperature=0, **{"max_new_tokens": 9} | options)
        return completion.text, TOKENIZER.decode(completion.tokens), completion.finish_reason

    assert complete("a", max_new_tokens=4) == ("bcde", "bcde", "length")
    assert complete("f") == ("ghij", "ghij", "stop")
    assert complete("a", stop="ef") == ("bcd", "bcdef", "stop")
    assert complete("a", stop=["x", "ef", "de"]) == ("bc", "bcde", "stop")
    assert complete("a", stop=[ord("d")]) == ("bc", "bcd", "stop")
    assert complete("a", stop="cde", max_new_tokens=3) == ("bcd", "bcd", "length")
    assert complete("a", stop="bcd", max_new_tokens=3) == ("", "bcd", "stop")
    [completion] = generate(m, ["i"], max_new_tokens=9, temperature=0)
    assert completion.tokens == [ord("j"), END]
    # What follows is certain but for the other logits, e ** -10 of it.
    np.testing.assert_allclose(completion.logprobs, 0, atol=1e-3)


def test_rows_end_on_their_own():
    prompts = ["h", "a", "e", "j", "g"]
    completions = generate(reciter("abcdefghij"), prompts, max_new_tokens=8, temperature=0)
    assert [c.text for c in completions] == ["ij", "bcdefghi", "fghij", "", "hij"]
    assert [c.finish_reason for c in completions] == ["stop", "length", "stop", "stop", "stop"]


def test_rows_that_end_make_room_for_prompts_that_wait(monkeypatch):
    """Chains of very different lengths, 1 to 26: few steps more than 8 full rows would take."""
    chain = "abcdefghijklmnopqrstuvwxyz"
    batches = []
    make = Rows.__init__

    def remembered(self, *arguments):
        make(self, *arguments)
        batches.append(self)

    monkeypatch.setattr(Rows, "__init__", remembered)
    # Some text before, so that not only completions have different lengths.
    prompts = ["é" * (n * 11 % 40) + chain[n * 7 % 26] for n in range(64)]
    options = {"max_new_tokens": 30, "temperature": 0}
    completions = generate(reciter(chain), prompts, batch_size=8, **options)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.text == chain[chain.index(prompt[-1]) + 1 :]
    [batch] = batches
    assert batch.size == 8
    ideal = sum(len(completion.tokens) for completion in completions) / 8
    assert ideal <= batch.steps_run <= 1.3 * ideal


def test_what_prompts_begin_with_runs_once(rng):
    m = model(RINGS)
    shared = rng.integers(0, 256, 140).tolist()
    prompts = [shared + rng.integers(0, 256, n).tolist() for n in (1, 30, 70)]
    rows = [np.array(x, np.int32) for x in [*prompts, prompts[1]]]
    prefill = Prefill(RINGS, program(RINGS), m.params, 512, rows)
    prefill(rows)
    # 128 in whole chunks; then each different prompt but its last token.
    assert prefill.positions_run == 128 + sum(len(prompt) - 1 - 128 for prompt in prompts)
    options = {"max_new_tokens": 10, "seed": 3}
    together = generate(m, [*prompts, prompts[1]], **options)
    for prompt, completion in zip(prompts, together, strict=False):
        assert completion.tokens == generate(m, [prompt], **options)[0].tokens
    samples = generate(m, prompts, num_samples=2, **options)
    assert [samples[n].tokens for n in (0, 2, 3, 4)] == [together[n].tokens for n in (0, 1, 3, 2)]
    assert samples[0].tokens != samples[1].tokens


def test_chunks_of_a_gpu_give_the_same_cells(rng, monkeypatch):
    """512 tokens at once, though 768 cells are not a multiple of that."""
    params = init_params(SMALL, jax.random.key(0))
    rows = [rng.integers(0, 256, n).astype(np.int32) for n in (5, 560)]
    caches = []
    for size in (64, 512):
        monkeypatch.setattr("transformer.inference.prefill.chunk_size", lambda size=size: size)
        caches.append(Prefill(SMALL, program(SMALL), params, 768, rows)(rows))
    for one, other in zip(*map(jax.tree.leaves, caches), strict=True):
        for row, tokens in enumerate(rows):  # what lies behind the tokens is undefined
            x, y = (cells[row, :, : len(tokens) - 1] for cells in (one, other))
            # Float32 rounding is 1e-6 of the largest; a cell of another token, all of it.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * np.abs(x).max())


def test_logits_are_adjusted_before_a_token_is_drawn():
    chain = "abcdefghij"
    m = reciter(chain)

    def complete(**options):
        [completion] = generate(m, ["a"], max_new_tokens=4, **{"temperature": 0} | options)
        return completion

    plain, skips = complete(top_logprobs=2), complete(logit_bias={ord("c"): -np.inf})
    assert plain.text == "bcde" and skips.text[0] == "b" and "c" not in skips.text
    for token, logprob, top in zip(plain.tokens, plain.logprobs, plain.top_logprobs, strict=True):
        assert next(iter(top)) == token and list(top.values()) == sorted(top.values())[::-1]
        assert top[token] == pytest.approx(logprob, abs=1e-6) and len(top) == 2
    assert complete().top_logprobs == []
    # The model's own log-probability of what it would not have drawn.
    assert skips.logprobs[1] < -5
    only = jnp.isin(jnp.arange(RINGS.vocab_size), np.array([ord("x"), ord("y")]))
    masked = complete(logits_processor=lambda logits, _: jnp.where(only, logits, -jnp.inf))
    assert set(masked.text) <= {"x", "y"}
    # The logit of what follows is 113; the bias exceeds it until three penalties are taken off.
    assert complete(logit_bias={ord("b"): 300.0}, frequency_penalty=70.0).text == "bbbc"


@pytest.mark.parametrize("every", [1, 3, 32])
def test_a_stream_is_the_text_in_whole_characters(every):
    m, options = reciter("aé€𝄞xyz"), {"max_new_tokens": 20, "temperature": 0, "stop": "yzq"}
    prompts = ["a", "x", "a", "a", "a"]
    pieces = list(stream(m, prompts, **options, every=every))
    texts = [[p.text for p in pieces if p.index == index] for index in range(2)]
    assert texts == [["é", "€", "𝄞", "x", "yz"], ["yz"]]  # "yz" may begin the stop text
    completions = {p.index: p.completion for p in pieces if p.completion}
    assert completions == dict(enumerate(generate(m, prompts, **options)))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (["a" * 250], {"max_new_tokens": 6}, "251 tokens.*max_new_tokens=6.*max_length=256"),
        (["a"], {"stop": [300]}, "stop: token id 300"),
        (["a"], {"temperature": -1}, "temperature=-1"),
        (["a"], {"numerics": "loose"}, "numerics='loose'"),
        (["a"], {"attention": "magic"}, "magic"),
        (["a"], {"every": 0}, "every=0"),
        (["a"], {"every": 33}, "every=33"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        stream(model(RINGS), prompts, **{"max_new_tokens": 4} | options)


def test_an_unknown_option_is_refused_and_the_known_ones_are_shown():
    with pytest.raises(TypeError, match="top_q"):
        generate(model(RINGS), ["a"], max_new_tokens=4, top_q=1)
    with pytest.raises(TypeError, match="max_new_tokens"):
        generate(model(RINGS), ["a"])
    shown = inspect.signature(generate).parameters
    assert {"model", "prompts", "max_new_tokens", "temperature", "stop"} <= set(shown)
    assert "every" in inspect.signature(stream).parameters and "every" not in shown


def test_the_longest_prompt_that_fits_is_taken():
    [completion] = generate(model(RINGS), [[1] * 255], max_new_tokens=1)
    assert len(completion.tokens) == 1


def test_damaged_parameters_are_named():
    params = model(RINGS).params
    params = params.replace(embedding=params.embedding.at[65].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="parameters are damaged"):
        generate(Model(RINGS, params, TOKENIZER), ["A"], max_new_tokens=4)
