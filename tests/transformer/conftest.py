"""What tests of the whole library share: configs drawn from all choices, `st.from_type(Config)`,
and parameters in which every number matters."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from transformer.config import CHOICES, Config, Delta, Latent, RotaryScaling
from transformer.program.init import init_params

SIZES = {"vocab_size": 61, "max_length": 64, "num_layers": 2, "width": 32}
SCALINGS = [None, *(RotaryScaling(kind, 4.0, 16) for kind in RotaryScaling.KINDS[:4])]
KINDS = ["attention"] * 3 + ["latent", "delta", ("delta", "attention"), ("attention", "latent")]
DELTA = Delta(num_key_heads=2, num_value_heads=4, key_size=6, value_size=5)


@st.composite
def configs(draw):
    pick = lambda *values: draw(st.sampled_from(values))
    placement, kinds, scan_layers = (
        pick(*CHOICES["norm_placement"]),
        pick(*KINDS),
        draw(st.booleans()),
    )
    options = {
        "positions": pick("rotary", "none"),
        "latent": Latent(rank=12, query_rank=pick(None, 10), rotary_size=4, value_size=6),
    }
    if "latent" not in kinds:
        options = {
            "positions": pick("rotary", "rotary", "learned", "alibi", "none"),
            "window": pick(None, 3, 8, (8, None), (4, 8)),
            "qk_norm": draw(st.booleans()),
            "qk_norm_over": pick("head", "all"),
            "attention_sinks": draw(st.booleans()),
            "attention_gate": draw(st.booleans()),
            "qkv_clip": pick(None, None, 0.3),
        }
    one_memory = not isinstance(options.get("window"), tuple)
    if kinds == "attention" and one_memory and not scan_layers:
        options["num_shared_kv_layers"] = pick(0, 0, 1)
    return Config(
        **SIZES,
        **options,
        num_heads=pick(2, 4),
        num_kv_heads=pick(1, 2),
        head_size=pick(8, 12),
        feed_forward_width=48,
        layer_kinds=kinds,
        delta=DELTA,
        rotary_fraction=pick(1.0, 0.5),
        rotary_scaling=pick(*SCALINGS),
        rotary_window_base=pick(None, 100.0),
        norm=pick("rms", "layer"),
        norm_placement=placement,
        feed_forward=pick(*CHOICES["feed_forward"]),
        biases=pick(*CHOICES["biases"]),
        attention_scale=pick(None, 0.2),
        attention_soft_cap=pick(None, 5.0),
        logit_soft_cap=pick(None, 10.0),
        parallel_residual=placement == "pre" and draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        embedding_scale=pick(1.0, 5.0),
        num_experts=pick(0, 0, 4),
        expert_width=pick(None, 20),
        expert_gates=pick(*CHOICES["expert_gates"]),
        expert_scale=pick(1.0, 2.0),
        expert_groups=pick(None, (2, 1)),
        shared_expert_width=pick(0, 24),
        shared_expert_gate=draw(st.booleans()),
        num_dense_layers=0 if scan_layers else pick(0, 1, (1,)),
        embedding_width=pick(None, None, 10),
        scan_layers=scan_layers,
        remat=pick("none", "segments", "dots"),
    )


st.register_type_strategy(Config, configs())


@cache
def _random_params(config, seed=0):
    """Parameters of which every one matters: of either sign, and norms around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        center = 1 if path[-1].name == "scale" else 0
        return jnp.asarray(center + 0.2 * rng.standard_normal(x.shape), x.dtype)

    # Drawn by NumPy, since compiling `init_params` takes a second.
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def random_params():
    """random_params(config, seed=0) draws parameters of which every one matters."""
    return _random_params
