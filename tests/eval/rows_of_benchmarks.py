"""Rows in the form of published data sets, made up."""

import json

WORDS = "lantern harbour orchard engine violin glacier market compass".split()


def text(i, n=60):
    """A text of `n` sentences that differ."""
    return " ".join(f"The {WORDS[(i + k) % 8]} of line {k} stood in row {i}." for k in range(n))


def longbench(i, **changed):
    row = {"input": f"Which row is {i}?", "context": text(i), "answers": [f"row {i}", "none"], "length": 300}
    return row | {"dataset": "toy", "language": "en", "all_classes": None, "_id": f"{i:03}"} | changed


LONGBENCH_V2 = {
    **{"_id": "1", "domain": "Toys", "sub_domain": "Toy", "difficulty": "easy", "length": "short"},
    **{"question": " Which one? ", "choice_A": "this", "choice_B": "that {x}", "choice_C": "both", "choice_D": "none"},
    **{"answer": "B", "context": f" {text(0)}\n"},
}

INFINITEBENCH = {
    "passkey": {"context": text(1), "input": "What is the pass key?", "answer": ["71432"]},
    "number_string": {"context": text(1), "input": "What is the sequence of digits?", "answer": ["1123"]},
    "kv_retrieval": {"context": '{"a-b": "c-d"}', "input": 'Key: "a-b"\nIts value is: ', "answer": "c-d"},
    "longbook_sum_eng": {"context": text(2), "input": "", "answer": ["A row.", "Another."]},
    "longbook_choice_eng": {
        **{"context": text(3), "input": "Who?", "answer": ["Bo"], "options": ["Al", "Bo", "Cy", "Di"]},
    },
    "longbook_qa_eng": {"context": text(3), "input": "Who?", "answer": ["Bo", "Bo Ek"], "options": []},
    "longbook_qa_chn": {"context": "雨下了一夜。" * 30, "input": "谁？", "answer": ["甲"], "options": []},
    "longdialogue_qa_eng": {"context": "$$MASK$$: hello", "input": "", "answer": ["JERRY"]},
    "math_find": {"context": "[3, 9, 4]", "input": "The largest number of the list is: ", "answer": 9},
    "math_calc": {"context": "1 + 3 - 9", "input": "", "answer": [1, 4, -5]},
    "code_run": {"context": "def func_7(x):", "input": "Please tell me what func_7(-3) returns.", "answer": 5},
    "code_debug": {
        **{"context": "def run(x):", "input": "", "answer": ["run", "C"], "options": ["a", "b", "run", "d"]},
    },
}

LEVAL = {
    "quality": {
        "instructions": ["Who?\n (A) Al (B) Bo", "When?\n (A) now (B) then", "Why?\n (A) no (B) yes"],
        **{"outputs": ["(B) Bo", "(A) now", "(A) no"], "input": text(4), "source": "toy", "evaluation": "exam"},
    },
    "news_summ": {
        **{"instructions": ["Summarise."], "outputs": ["Three words here."], "input": text(5), "evaluation": "rouge"},
    },
}


def write(path, rows):
    """Rows as JSON lines, or as a list where the file is called `.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    body = "[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines) + "\n"
    path.write_text(body, encoding="utf-8")
