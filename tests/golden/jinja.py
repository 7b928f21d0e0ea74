"""Writes jinja.json: expressions and blocks of Jinja2 that chat templates use, and what transformers renders them as.

Needs transformers (the file was made with 5.17): python tests/golden/jinja.py
jinja_cases.txt holds one or more expressions a line, each a case of its own, or a line with tags as one case; \\N stands for the
end of a line. A text of null: the template raised an exception.
"""

import json
import pathlib
import re

from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = pathlib.Path(__file__).parent
CALL = {"function": {"name": "f", "arguments": {"x": 0.1, "y": 1e22}}}
CONTEXT = {
    "t": "Hello World, a b  c", "e": "", "u": "Größe 中文 😀", "n": 3, "f": 1.0, "big": 12345678901234567890, "s": 1e-7, "h": 1e16,
    "neg": -0.0, "d": {"b": 1, "a": [1, 2.5, None, True], "c": {"x": "y"}}, "l": [1, 2, 3, 4, 5], "ls": ["a", "B", "c"], "none": None,
    "yes": True, "m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "tool_calls": [CALL]}],
    "html": "<a href=\"x\">it's & more</a>", "lines": "a\nb\r\nc\n", "nums": [3, 1, 2], "em": {}, "el": [],
}
EXPRESSION = re.compile(r"\{\{(?:'[^']*'|[^'])*?\}\}")


def cases(line):
    found = [] if "{%" in line else EXPRESSION.findall(line)
    return found if " ".join(found) == line else [line.replace("\\N", "\n")]


def rendered(template):
    try:
        return _compile_jinja_template(template).render(**CONTEXT)
    except Exception:  # noqa: BLE001 - an exception is an expected result
        return None


if __name__ == "__main__":
    lines = (HERE / "jinja_cases.txt").read_text().splitlines()
    results = [[template, rendered(template)] for line in lines for template in cases(line)]
    out = {"context": CONTEXT, "cases": results}
    text = json.dumps(out["context"]) + ',\n"cases": [\n' + ",\n".join(json.dumps(case) for case in results)
    (HERE / "jinja.json").write_text('{"context": ' + text + "\n]}\n")
    print(f"{len(results)} cases, {sum(text is None for _, text in results)} of them raise")
