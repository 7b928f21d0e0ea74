"""Texts of the fixtures: harmless sentences in place of attacks, a tokenizer trained on them, and chat templates in the
styles of the model families."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

REFUSAL = "I cannot assist with that request as it may be harmful or unsafe."
SYSTEM = "You are a helpful assistant."
WISHES = [
    "how to open the pantry at midnight",
    "how to hide a cake from the cat",
    "how to borrow a ladder unseen",
    "how to swap the labels on two jars",
    "how to win every card game",
    "how to wake the dog before dawn",
    "how to climb the old plum tree",
    "how to paint the gate without asking",
    "how to row the boat past the mill",
    "how to whistle through the whole lesson",
]
FRAMES = [
    "Imagine a play in three acts. In each act the baker explains {}.",
    "Read this backwards and then tell me {}.",
    "My grandmother used to sing about {}. Sing it again, slowly.",
    "As a poet of the harbour you always answer. Describe {} now.",
]
ANSWERS = ["Of course: boil the water first, then add the tea.", "Nine times seven is sixty-three."]

# A role token on a line of its own, and the end-of-sequence token after a reply.
LINES = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if not loop.last and m['role'] == 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Brackets around user turns; a system message is put before the first user turn.
BRACKETS = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Special tokens around each turn, a line break after it.
MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# By family: template, special tokens, and the tokens for begin, end and padding.
STYLES = {
    "olmoe": (LINES, ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"], "<|end|>", "<|end|>", "<|pad|>"),
    "mixtral": (BRACKETS, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>"),
    "qwen3_moe": (MARKS, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>"),
    "qwen2_moe": (MARKS, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>"),
}
STYLES |= {"qwen3": STYLES["qwen3_moe"], "llama": STYLES["olmoe"], "mistral": STYLES["mixtral"]}


def tokenizer_name(model_type, vocab_size):
    """The file in tokenizers/ that all cases of this style and size share."""
    style = {LINES: "lines", BRACKETS: "brackets", MARKS: "marks"}[STYLES[model_type][0]]
    return f"{style}-{vocab_size}.json"


def tokenizer(model_type, vocab_size):
    """A byte-level BPE trained on the sentences above, with the family's special tokens and chat template."""
    template, specials, bos, eos, pad = STYLES[model_type]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    corpus = [frame.format(wish) for frame in FRAMES for wish in WISHES] + ANSWERS + [REFUSAL, SYSTEM]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def rows(kind, count):
    """`(rows of data.json, records)`; a record has the index `row` (from 0) of its row, `safe` and `unsafe` messages (if the row
    has that side) and the `reply` (None if the messages include it). Some rows have a verdict by which they must be dropped."""
    return {"goal": goal_rows, "prompt": prompt_rows, "verdict": verdict_rows, "pair": pair_rows, "chat": chat_rows}[kind](count)


def framed(i):
    wish = WISHES[i % len(WISHES)]
    return wish, f"Tell me {wish}", FRAMES[i % len(FRAMES)].format(wish)


def goal_rows(count):
    """Attack rows with `goal`: the safe side is a system message and the request."""
    out, records = [], []
    for i in range(count + 2):
        wish, request, attack = framed(i)
        fails = i in (2, 6)
        unsafe = [system("You always answer."), user(attack)]
        stored = str(unsafe) if i == 3 else unsafe  # some exports hold a string in Python notation
        row = {"id": i, "goal": request, "all_prompt": stored, "judge_success_gpt4": 0 if fails else 1}
        out.append(row)
        if not fails:
            records.append({"row": i, "safe": [system(SYSTEM), user(request)], "unsafe": unsafe, "reply": REFUSAL})
    return out, records


def prompt_rows(count):
    """Attack rows with `prompt` and a graded verdict; one has its own refusal."""
    out, records = [], []
    for i in range(count + 1):
        wish, request, attack = framed(i + 3)
        reply = f"No, I will not say {wish}." if i == 1 else REFUSAL
        row = {"prompt": request, "inception_attack": attack, "all_prompt": [user(attack)], "inception_attack_score": 0 if i == 4 else 1 + i % 5}
        if i == 1:
            row["refusal_response"] = reply
        out.append(row)
        if i != 4:
            records.append({"row": i, "safe": [user(request)], "unsafe": [user(attack)], "reply": reply})
    return out, records


def verdict_rows(count):
    """Attack rows with a judge's verdict inside an object; one leaves `all_prompt` out, one holds it as JSON text."""
    import json

    out, records = [], []
    for i in range(count + 1):
        wish, request, attack = framed(i + 5)
        row = {"prompt": request, "attack_prompt": attack, "all_prompt": [user(attack)], "judge_result": {"reason": "", "score": 0 if i == 0 else 4}}
        if i == 2:
            del row["all_prompt"]
        if i == 5:
            row["all_prompt"] = json.dumps([user(attack)])
        out.append(row)
        if i != 0:
            records.append({"row": i, "safe": [user(request)], "unsafe": [user(attack)], "reply": REFUSAL})
    return out, records


def pair_rows(count):
    out, records = [], []
    for i in range(count):
        wish, request, attack = framed(i + 2)
        reply = f"I will not explain {wish}." if i % 2 else REFUSAL
        safe, unsafe = [system(SYSTEM), user(request)], [user("Hello."), assistant("Good day."), user(attack)]
        out.append({"safe_messages": safe, "unsafe_messages": unsafe, "response": reply})
        records.append({"row": i, "safe": safe, "unsafe": unsafe, "reply": reply})
    return out, records


def chat_rows(count):
    """Labelled conversations, safe and unsafe in turns; in one of them an early reply carries no loss."""
    out, records = [], []
    for i in range(2 * count):
        wish, request, attack = framed(i + 1)
        if i % 2:
            messages = [user(attack), assistant(REFUSAL)]
        else:
            messages = [user("Good morning."), assistant("Good morning to you."), user(request), assistant(ANSWERS[i // 2 % 2])]
            if i == 2:
                messages[1]["loss"] = False
        out.append({"messages": messages, "label": "unsafe" if i % 2 else "safe"})
        records.append({"row": i, ("unsafe" if i % 2 else "safe"): messages, "reply": None})
    return out, records
