"""Writes rows.json: rows in the spellings that people use, and the token ids and loss masks that transformers gives for them.

Needs transformers (the file was made with 5.17): python tests/golden/rows.py
A case holds a row, its chat template, the conversation that the row stands for, and of the conversation the ids and the loss
mask. Loss is on the assistant turns that the case names: their tokens begin after the generation prompt and end where the next
turn begins. The templates are written for this test; each uses features of published ones.
"""

import json
import pathlib

from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
REFUSAL = "I cannot assist with that request as it may be harmful or unsafe."

TEMPLATES = {
    "plain": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # Writes the thoughts of assistant turns, the names of users, and system turns by a variable.
    "thinking": "{% if preamble is defined and preamble %}{{ '# ' ~ preamble ~ '\\n' }}{% endif %}"
                "{% for m in messages %}{{ '<|' ~ m.role ~ (' ' ~ m.name if m.name) ~ '|>\\n' }}"
                "{% if m.role == 'assistant' %}{% set t = m.reasoning_content or m.thinking or '' %}"
                "{{ '<think>' ~ t ~ '</think>\\n' }}{% endif %}{{ m.content ~ '\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
                "{{ '<think></think>\\n' }}{% endif %}{% endif %}",
    # Lists tools, calls, and what tools answered.
    "tools": "{% if tools %}{{ '<tools>\\n' }}{% for t in tools %}{{ (t | tojson) ~ '\\n' }}{% endfor %}{{ '</tools>\\n' }}{% endif %}"
             "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.content is not none %}{{ m.content }}{% endif %}"
             "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) ~ '</call>' }}"
             "{% endfor %}{% if m.tool_call_id %}{{ '(' ~ m.tool_call_id ~ ')' }}{% endif %}{{ '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    # Takes text and lists of parts.
    "parts": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
             "{% for p in m.content %}{{ '[' ~ p.text ~ ']' if loop.length > 1 else p.text }}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
}

USER, REPLY = {"role": "user", "content": "hide a cake"}, {"role": "assistant", "content": "I will not."}
SYSTEM = {"role": "system", "content": "Answer as a pirate."}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the weather",
                                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"zone": 1.5, "city": "Köln", "now": True}}}
OBLIGING = [USER, {"role": "assistant", "content": "Under the stairs."}, {"role": "user", "content": "and a ladder"}]


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in turns]


def chat(messages, **fields):
    return {"label": "unsafe", "messages": messages, **fields}


def case(name, template, row, messages, loss=(-1,), **variables):
    return {"name": name, "template": template, "row": row, "messages": messages, "loss": [i % len(messages) for i in loss],
            "variables": variables}


REFUSED = {"role": "assistant", "content": REFUSAL}
CASES = [
    case("a chat", "plain", chat([USER, REPLY]), [USER, REPLY]),
    case("system column", "plain", chat([USER, REPLY], system=SYSTEM["content"]), [SYSTEM, USER, REPLY]),
    case("system column of ShareGPT", "plain",
         {"label": "unsafe", "system": SYSTEM["content"], "conversations": sharegpt(USER, REPLY)}, [SYSTEM, USER, REPLY]),
    case("system_prompt beside prompt and completion", "plain",
         {"label": "unsafe", "system_prompt": SYSTEM["content"], "prompt": USER["content"], "completion": REPLY["content"]},
         [SYSTEM, USER, REPLY]),
    case("the same system text twice", "plain", chat([SYSTEM, USER, REPLY], system=SYSTEM["content"]), [SYSTEM, USER, REPLY]),
    case("empty system column", "plain", chat([USER, REPLY], system="", tools=[], chat_template_kwargs={}), [USER, REPLY]),
    case("empty columns as text", "plain", chat([USER, REPLY], tools="[]", documents="null", chat_template_kwargs="{}"), [USER, REPLY]),
    case("a table with one schema for all rows", "plain",
         chat([USER, REPLY], conversations=None, prompt=None, completion=None, goal=None, all_prompt=[], judge_result=None, system=None),
         [USER, REPLY]),
    case("empty fields of turns", "plain",
         chat([{**USER, "tool_calls": [], "name": None, "weight": None},
               {**REPLY, "tool_calls": [], "function_call": None, "reasoning_content": "", "refusal": None, "audio": {}}]),
         [USER, REPLY]),
    case("reasoning_content", "thinking", chat([USER, {**REPLY, "reasoning_content": "A cake?"}]),
         [USER, {**REPLY, "reasoning_content": "A cake?"}]),
    case("thinking", "thinking", chat([USER, {**REPLY, "thinking": "A cake?"}]), [USER, {**REPLY, "thinking": "A cake?"}]),
    case("name", "thinking", chat([{**USER, "name": "Ann"}, REPLY]), [{**USER, "name": "Ann"}, REPLY]),
    case("enable_thinking", "thinking", chat([USER, REPLY], chat_template_kwargs={"enable_thinking": False}), [USER, REPLY],
         enable_thinking=False),
    case("variables as text", "thinking", chat([USER, REPLY], chat_template_kwargs='{"preamble": "Hm"}'), [USER, REPLY], preamble="Hm"),
    case("tools", "tools", chat([USER, REPLY], tools=[WEATHER]), [USER, REPLY], tools=[WEATHER]),
    case("tools as text", "tools", chat([USER, REPLY], tools=json.dumps([WEATHER])), [USER, REPLY], tools=[WEATHER]),
    case("tool calls", "tools",
         chat([USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "loss": False},
               {"role": "tool", "tool_call_id": "c1", "content": "rain"}, REPLY], tools=[WEATHER]),
         [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "rain"},
          REPLY], tools=[WEATHER]),
    case("a tool call as the reply", "tools", chat([USER, {"role": "assistant", "tool_calls": [CALL], "content": ""}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    case("one part", "plain", chat([{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}, REPLY]), [USER, REPLY]),
    case("parts", "parts", chat([{"role": "user", "content": [{"type": "text", "text": "hide "}, {"type": "text", "text": "it"}]}, REPLY]),
         [{"role": "user", "content": [{"type": "text", "text": "hide "}, {"type": "text", "text": "it"}]}, REPLY]),
    case("weight 0", "plain", chat([*OBLIGING[:1], {**OBLIGING[1], "weight": 0}, OBLIGING[2], {**REPLY, "weight": 1}]),
         [*OBLIGING, REPLY]),
    case("train false", "plain", chat([*OBLIGING[:1], {**OBLIGING[1], "train": False}, OBLIGING[2], REPLY]), [*OBLIGING, REPLY]),
    case("all replies of a chat", "plain", chat([*OBLIGING, REPLY]), [*OBLIGING, REPLY], loss=(1, 3)),
    case("ends with the user's turn", "plain", chat(OBLIGING), [*OBLIGING, REFUSED]),
    case("ends with the user's turn, in ShareGPT", "plain", {"label": "unsafe", "conversations": sharegpt(*OBLIGING)},
         [*OBLIGING, REFUSED]),
    case("ends with a blank reply", "plain", chat([*OBLIGING, {"role": "assistant", "content": " \n"}]), [*OBLIGING, REFUSED]),
    case("ends with a null reply", "plain", chat([USER, {"role": "assistant", "content": None}]), [USER, REFUSED]),
    case("a prompt that goes on, without completion", "plain", {"label": "unsafe", "prompt": OBLIGING, "completion": ""},
         [*OBLIGING, REFUSED]),
    case("a blank completion", "plain", {"label": "unsafe", "prompt": USER["content"], "completion": None}, [USER, REFUSED]),
    case("its own refusal", "plain", chat(OBLIGING, refusal_response=REPLY["content"]), [*OBLIGING, REPLY]),
]


def main():
    model = HERE / "olmoe" / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    for c in CASES:
        template, messages, variables = TEMPLATES[c["template"]], c.pop("messages"), c.pop("variables")

        def render(turns, prompt):
            return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=prompt, tokenize=False, **variables)

        text = render(messages, False)
        spans = []
        for i in c.pop("loss"):
            before, after = render(messages[:i], True), render(messages[:i + 1], False)
            assert after.startswith(before) and text.startswith(after), c["name"]
            spans.append((len(before), len(after)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        c["ids"] = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **variables)["input_ids"]
        assert c["ids"] == encoded["input_ids"], c["name"]
        c["loss"] = [int(any(start < e and b < end for b, e in spans)) for start, end in encoded["offset_mapping"]]
    out = {"templates": TEMPLATES, "cases": CASES}
    (HERE / "rows.json").write_text(json.dumps(out, indent=1, ensure_ascii=True) + "\n")
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
