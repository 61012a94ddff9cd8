"""Tasks are answered from their texts: a real model finds what is there, and does not guess what is not."""

from statistics import fmean

import pytest
import real_models

from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.running import Plan, Settings, build_instance, evaluate
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.tasks import TASKS
from hf_kvcache.eval.tasks.evidence import task_without_answers

pytestmark = pytest.mark.slow
NAMES = "niah_single_1", "niah_single_2", "passkey"
LENGTH, N_INSTANCES = 1024, 3


@pytest.fixture(scope="module")
def smollm2():
    return real_models.smollm2()


def scores(smollm2, tasks, n_instances, seed=0):
    """Of the dense model, by task."""
    lines = Lines(None, {})
    plan = Plan(tuple(tasks), (LENGTH,), n_instances, ("known",), (parse("dynamic"),), batch_size=n_instances)
    evaluate(*smollm2, plan, Settings(seed=seed, replays=False), lines)
    assert not [line.error for line in lines if line.error]
    return {task.name: fmean(line.score for line in lines if line.task == task.name) for task in tasks}


@pytest.mark.parametrize("name", NAMES)
def test_without_its_answers_a_text_is_of_no_use(smollm2, name):
    (found,) = scores(smollm2, [TASKS[name]], N_INSTANCES).values()
    (blind,) = scores(smollm2, [task_without_answers(TASKS[name])], N_INSTANCES).values()
    assert found >= 2 / 3 and blind == 0


@pytest.mark.parametrize("name", TASKS)
def test_two_seeds_are_two_instances(smollm2, name):
    prompter = Prompter(smollm2[1])
    one, again, other = (build_instance(TASKS[name], prompter, LENGTH, 0, Settings(seed=seed)) for seed in (0, 0, 1))
    assert one == again and one.context != other.context
    assert one.questions[0].answers != other.questions[0].answers
    n_tokens = prompter.prompt(one).n_tokens("known") + one.questions[0].max_new_tokens
    assert 0.8 * LENGTH < n_tokens <= LENGTH
