"""Evaluates a model on tasks of lm-evaluation-harness, which `pip install -e .[eval]` installs.

    python -m experiments.evaluate --model=PATH --tasks=NAME,NAME

PATH is what `transformer.load` takes. A task is one that the harness has, or the name of one in a
directory of YAML files that --include_path names.
"""

import json

from absl import flags

from experiments.run import cli

_MODEL = flags.DEFINE_string("model", None, "What `transformer.load` takes.", required=True)
_TASKS = flags.DEFINE_list("tasks", None, "Names of tasks.", required=True)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A directory of tasks of your own.")
_LIMIT = flags.DEFINE_integer("limit", None, "Examples of each task, at most.", lower_bound=1)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in the prompt.", lower_bound=0)
_CHAT = flags.DEFINE_bool("chat", False, "Put prompts into the model's chat template.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Completions at once.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print the results as JSON.")


def main(argv):
    """Loads the model, runs the tasks, and prints their results."""
    del argv
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        cli.fail(f"lm-evaluation-harness is needed, as by pip install -e .[eval] ({error}).")
    from experiments.suites.harness import Harness
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        harness = Harness(load(_MODEL.value), _BATCH_SIZE.value)
        tasks = TaskManager(include_path=_INCLUDE_PATH.value)
        unknown = [name for name in _TASKS.value if name not in tasks.all_tasks]
        if unknown:
            raise ValueError(f"there is no task {unknown[0]!r}; --include_path adds your own.")
        results = lm_eval.simple_evaluate(
            harness,
            tasks=_TASKS.value,
            task_manager=tasks,
            limit=_LIMIT.value,
            num_fewshot=_NUM_FEWSHOT.value,
            apply_chat_template=_CHAT.value,
        )
    if _JSON.value:
        print(json.dumps(results["results"], indent=2))
    else:
        print(make_table(results))


if __name__ == "__main__":
    cli.start(main)
