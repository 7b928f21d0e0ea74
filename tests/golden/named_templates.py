"""Writes named_templates.json: folders with several chat templates, and which of them transformers takes.

Needs transformers (the file was made with 5.17): python tests/golden/named_templates.py
A case holds the files of a model folder, and what apply_chat_template renders without and with tools (null: it raises).
"""

import json
import pathlib
import tempfile

from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
BASE = "marks-304"
CONFIG = "tokenizer_config.json"
TURNS = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
DEFAULT = "D{{ tools | length if tools }}" + TURNS
TOOL_USE = "T{{ tools[0].function.name if tools }}" + TURNS
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def named(**templates):
    return [{"name": name, "template": template} for name, template in templates.items()]


CASES = {
    "one text": {CONFIG: {"chat_template": DEFAULT}},
    "a list": {CONFIG: {"chat_template": named(default=DEFAULT, tool_use=TOOL_USE)}},
    "a list in another order": {CONFIG: {"chat_template": named(rag="R", tool_use=TOOL_USE, default=DEFAULT)}},
    "a list without tool_use": {CONFIG: {"chat_template": named(default=DEFAULT, rag="R")}},
    "a list without default": {CONFIG: {"chat_template": named(tool_use=TOOL_USE, rag="R")}},
    "a list with one name twice": {CONFIG: {"chat_template": named(default="1") + named(default=DEFAULT)}},
    "an object": {CONFIG: {"chat_template": {"default": DEFAULT, "tool_use": TOOL_USE}}},
    "files": {CONFIG: {}, "chat_template.jinja": DEFAULT, "additional_chat_templates/tool_use.jinja": TOOL_USE},
    "files before the list": {
        CONFIG: {"chat_template": named(default="C", tool_use="C")},
        "chat_template.jinja": DEFAULT,
        "additional_chat_templates/tool_use.jinja": TOOL_USE,
    },
    "one file before the list": {CONFIG: {"chat_template": named(default="C", tool_use="C")}, "chat_template.jinja": DEFAULT},
    "tool_use as a file alone": {CONFIG: {"chat_template": DEFAULT}, "additional_chat_templates/tool_use.jinja": TOOL_USE},
    "default among the additional files": {
        CONFIG: {}, "chat_template.jinja": "1", "additional_chat_templates/default.jinja": DEFAULT,
    },
    "files of other names": {CONFIG: {"chat_template": DEFAULT}, "chat_template.jinja": DEFAULT, "additional_chat_templates/tool_use.txt": "T"},
    "tool_use that does not compile": {CONFIG: {"chat_template": named(default=DEFAULT, tool_use="{% if %}")}},
}


def result(files):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "tokenizer.json").write_text((HERE / "tokenizers" / f"{BASE}.json").read_text())
        (folder / "additional_chat_templates").mkdir()
        for file, content in files.items():
            content = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **content}) if file == CONFIG else content
            (folder / file).write_text(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def render(tools):
            try:
                return tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
            except Exception:  # noqa: BLE001 - an exception is an expected result
                return None

        return {"files": files, "plain": render(None), "with_tools": render(TOOLS)}


if __name__ == "__main__":
    out = {"base": BASE, "tools": TOOLS, "messages": MESSAGES, "cases": {name: result(files) for name, files in CASES.items()}}
    (HERE / "named_templates.json").write_text(json.dumps(out, indent=1) + "\n")
    print({name: (case["plain"], case["with_tools"]) for name, case in out["cases"].items()})
