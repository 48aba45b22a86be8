"""The choice of the backend: what is picked, what is said, what is refused."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from kernels import attention
from kernels.backends import choice as backends
from kernels.tracing.target import platform, target


@pytest.fixture
def offered(monkeypatch):
    """Fakes the backends `good`, `bad` (always refuses) and `missing` (does not import)."""

    def refuse(*_, **__):
        raise NotImplementedError("it is a bad one")

    modules = {"good": types.SimpleNamespace(attend=lambda: "good")}
    modules["bad"] = types.SimpleNamespace(attend=refuse)

    def load(path):
        if path not in modules:
            raise ImportError(f"no module named {path}")
        return modules[path]

    monkeypatch.setattr(backends, "BACKENDS", {n: n for n in ("good", "bad", "missing")})
    monkeypatch.setattr(backends, "importlib", types.SimpleNamespace(import_module=load))
    backends._say.cache_clear()

    def offer(*names):
        monkeypatch.setattr(backends, "AUTO", {platform(): names})

    return offer


def attend(module):
    return module.attend()


def test_auto_takes_the_first_that_can_and_says_so_once(offered, caplog):
    caplog.set_level(logging.INFO, "kernels.backends.choice")
    offered("good", "bad")
    assert backends.run("auto", attend) == backends.run("auto", attend) == "good"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith("runs on the backend 'good'")


def test_auto_collects_the_reasons_of_those_that_cannot(offered, caplog):
    offered("missing", "bad", "good")
    assert backends.run("auto", attend) == "good"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no module named missing" in record.getMessage()
    assert "bad: it is a bad one" in record.getMessage()

    offered("missing", "bad")
    with pytest.raises(NotImplementedError, match=r"(?s)missing: it needs .*bad: it is a bad one"):
        backends.run("auto", attend)


def test_auto_tries_others_first_where_positions_are_known_and_is_silent_about_them(
    offered, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "kernels.backends.choice")
    offered("bad", "good")
    monkeypatch.setattr(backends, "AUTO_KNOWN", {platform(): ("missing", "good")})
    assert backends.run("auto", attend, known=True) == "good"
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_on_a_gpu_auto_takes_cudnn_for_positions_that_are_known(monkeypatch):
    pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((2, 65, 4, 64), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, 65), jnp.int32)
    known = lambda x: attention(x, x, x)
    data = lambda x, positions: attention(x, x, x, q_positions=positions)
    with target("gpu", 90):
        for function, arguments, name in ((known, [x], "cudnn"), (data, [x, positions], "triton")):
            gradient = jax.grad(lambda *x, f=function: f(*x).sum(dtype=jnp.float32))
            jaxpr = str(jax.make_jaxpr(gradient)(*arguments))
            calls = {"cudnn": jaxpr.count("dot_product_attention"), "triton": jaxpr.count("triton")}
            assert [backend for backend, count in calls.items() if count] == [name]


@pytest.mark.parametrize("name", ["bad", "missing"])
def test_an_explicit_choice_never_falls_back(offered, name):
    offered("good")
    with pytest.raises(NotImplementedError, match=f"attention backend '{name}': it "):
        backends.run(name, attend)


def test_every_auto_choice_exists_and_ends_with_what_can_do_all():
    for names in backends.AUTO.values():
        assert set(names) <= set(backends.BACKENDS)
        assert names[-1] == "xla"


@pytest.mark.parametrize(
    ("name", "device"), [("triton", "GPU"), ("cudnn", "GPU"), ("splash", "TPU")]
)
def test_a_backend_of_another_platform_says_so(name, device):
    x = jnp.zeros((1, 2, 1, 32), jnp.bfloat16)
    with target("cpu"), pytest.raises(NotImplementedError) as error:
        attention(x, x, x, backend=name)
    if "it needs" not in str(error.value):  # a package that is not installed
        assert f"{device}s, and this is a cpu" in str(error.value)


def test_the_interpreter_is_for_a_cpu():
    x = jnp.zeros((1, 2, 1, 32))
    with target("gpu", 90), pytest.raises(NotImplementedError) as error:
        attention(x, x, x, backend="triton_interpret")
    if "it needs" not in str(error.value):  # a package that is not installed
        assert "interprets kernels on a CPU, and this is a gpu" in str(error.value)
