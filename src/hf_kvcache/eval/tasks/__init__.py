"""Tasks over long texts: generated for any tokenizer and length, each after its published definition."""

from hf_kvcache.eval.tasks import needles, passkeys, questions, tracking, words
from hf_kvcache.eval.tasks.instances import Instance, Question, Task

_RULER = (*needles.TASKS, *tracking.TASKS, *words.TASKS, *questions.TASKS)
TASKS = {task.name: task for task in (*_RULER, *passkeys.TASKS)}

# names that stand for several; "needles" are those that look something up
GROUPS = {
    "ruler": tuple(task.name for task in _RULER),
    "needles": tuple(task.name for task in (*needles.TASKS, *passkeys.TASKS)),
    "all": tuple(TASKS),
}

__all__ = ["GROUPS", "TASKS", "Instance", "Question", "Task", "markdown", "tasks_named"]


def tasks_named(text: str) -> list[Task]:
    """Tasks of a list such as "niah_single_1,vt" or "ruler"; each once, in the order named.

    Raises:
        ValueError: a name that is neither a task's nor a group's.
    """
    found: dict[str, Task] = {}
    for name in (part.strip() for part in text.split(",")):
        if name not in GROUPS and name not in TASKS:
            raise ValueError(f"no task is called {name!r}; tasks: {', '.join(TASKS)}; groups: {', '.join(GROUPS)}")
        found |= {member: TASKS[member] for member in GROUPS.get(name, (name,))}
    return list(found.values())


def markdown() -> str:
    """Table of tasks for docs/evaluation.md."""
    rows = [f"| `{task.name}` | {task.summary} | {task.score.__name__} | {task.paper} |" for task in TASKS.values()]
    return "\n".join(["| task | what is asked for | scored by | paper |", "|---|---|---|---|", *rows])
