"""A task and a tiny model for tests of the evaluation."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.models import embedded_model

WORDS = "lantern harbour orchard engine violin glacier market compass".split()


def build(count, n_tokens, rng, n_questions=1):
    """Colours of things between the same sentence again and again."""
    things = rng.choice(WORDS, n_questions, replace=False).tolist()
    colours = rng.choice(["red", "blue", "green"], n_questions).tolist()
    facts = "".join(f"The {thing} is {colour}. " for thing, colour in zip(things, colours, strict=True))
    questions = tuple(
        Question(f"\nWhat is the colour of the {thing}?", (colour,), " It is", max_new_tokens=3)
        for thing, colour in zip(things, colours, strict=True)
    )
    instruction, filler = "Remember colours.\n", "The rain fell on the roof. "
    n_left = n_tokens - count(instruction + facts) - max(count(q.text + q.prefix) + q.max_new_tokens for q in questions)
    if n_left < 0:
        raise ValueError(f"{n_tokens} tokens are too few")
    return Instance(instruction, filler * (n_left // count(filler)) + facts, questions)


def score(answer, question):
    return sum(word in answer for word in question.answers) / len(question.answers)


COLOURS = Task("colours", "colours of things", build, score)


def small_model():
    """The embedded model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32", attn_implementation="hf_kvcache")
    return model.eval(), AutoTokenizer.from_pretrained(embedded_model())
