"""Policy gradients on tasks with verifiable rewards: what a policy draws, and a step along it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run.rl_config import RlExperiment
from experiments.run.tasks import TASKS, marks
from transformer.data.batches import Batch
from transformer.inference.generate import generate
from transformer.program.program import program
from transformer.storage.model import Model
from transformer.training.loss import compute_logits, row_cache
from transformer.training.step import follow


class Rollouts(NamedTuple):
    """Answers that a policy has drawn, rows [B, T] of prompt and answer.

    batch: their tokens; the weights are 1 where the target belongs to the answer.
    logprobs: [B, T], what the sampler said of these targets.
    advantages: [B, T], the reward of a token, 1 if it is right, minus the mean of what the other
      answers to the same task got in its place.
    """

    batch: Batch
    logprobs: np.ndarray
    advantages: np.ndarray


def draw(model: Model, experiment: RlExperiment, step: int) -> tuple[Rollouts, float, str]:
    """Draws the answers of one step, which follow from the seed and the number of the step.

    Returns:
      The rollouts, their mean reward, and one answer as text.
    """
    rl, options = experiment.rl, experiment.train
    rng = np.random.default_rng((options.seed, experiment.data.seed, step))
    tasks = [TASKS[rl.task](rng, rl.size) for _ in range(rl.prompts)]
    begin = model.tokenizer.document_start
    asked = [task for task in tasks for _ in range(rl.samples)]
    prompts = [[*begin, *model.tokenizer.encode(task.question)] for task in asked]
    completions = generate(
        model,
        prompts,
        max_new_tokens=len(tasks[0].answer),
        seed=int(rng.integers(2**31)),
        numerics=options.numerics,
        attention=options.attention,
    )
    answers = [model.tokenizer.encode(task.answer) for task in asked]
    drawn = [completion.tokens for completion in completions]
    rewards = np.array([marks(*pair) for pair in zip(answers, drawn, strict=True)], np.float32)
    by_task = rewards.reshape(rl.prompts, rl.samples, -1)
    others = (by_task.sum(1, keepdims=True) - by_task) / (rl.samples - 1)
    rows = _rows(prompts, completions, (by_task - others).reshape(rewards.shape))
    return rows, float(rewards.mean()), f"{tasks[0].question}{completions[0].text}"


def _rows(prompts, completions, advantages):
    length = max(map(len, prompts)) + advantages.shape[1]
    tokens, weights, logprobs, gains = (np.zeros((len(prompts), length), t) for t in "ifff")
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        new = slice(len(prompt), len(prompt) + len(completion.tokens))
        tokens[row, : new.stop] = [*prompt, *completion.tokens]
        weights[row, new] = 1
        logprobs[row, new] = completion.logprobs
        gains[row, new] = advantages[row, : len(completion.tokens)]
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, weights[:, 1:])
    return Rollouts(batch, logprobs[:, 1:], gains[:, 1:])


def make_rl_step(config, optimizer, *, numerics: str, attention: str) -> Callable:
    """Makes a compiled `rl_step(state, rollouts) -> (state, metrics)`, which donates the state.

    The objective is the mean of advantage times importance ratio, the ratio of the trainer's
    probability of a token to the sampler's; with the advantages of `Rollouts`, its gradient is that
    of REINFORCE leave-one-out (arXiv:2402.14740).

    Metrics, besides those of `follow`: `loss`, minus the objective; `kl`, the estimate of the
    divergence of the trainer from the sampler, mean of r - 1 - log r (J. Schulman 2020);
    `largest_ratio` and `smallest_ratio`.
    """
    f = program(config, numerics=numerics, attention=attention)

    def loss(params, rollouts):
        batch = rollouts.batch
        logits = compute_logits(f, params, row_cache(config, batch), batch)
        nll, _ = f.numerics.cross_entropy(logits, batch.targets)
        drawn = batch.weights > 0
        log_ratio = jnp.where(drawn, -nll - rollouts.logprobs, 0)
        ratio = jnp.exp(log_ratio)
        mean = lambda x: jnp.sum(x * batch.weights) / jnp.sum(batch.weights)
        value = -mean(ratio * rollouts.advantages)
        measured = {
            "loss": value,
            "kl": mean(ratio - 1 - log_ratio),
            "largest_ratio": ratio.max(where=drawn, initial=0),
            "smallest_ratio": ratio.min(where=drawn, initial=jnp.inf),
        }
        return value, measured

    @partial(jax.jit, donate_argnums=0)
    def rl_step(state, rollouts):
        (value, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, rollouts)
        state, moved = follow(optimizer, state, value, gradient)
        return state, measured | moved

    return rl_step
