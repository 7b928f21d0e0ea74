"""Writes choices.json: questions with choices, and the log-likelihoods that transformers gives the choices in two golden models.

Needs torch and transformers (the file was made with 5.17): python tests/golden/choices.py
A choice's log-likelihood is the sum of log p over its tokens, given the rendered prompt with the generation prompt: the tokens of the
whole text beyond the number of the prompt's tokens. Products in f64 over the stored weights.
"""

import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).parent
CASES = ("olmoe", "dense_llama_bias")
QUESTIONS = [
    {"id": "q1", "question": "What is boiled first?", "choices": ["the water", "tea", "the old plum tree"], "answer": 0},
    {"id": "q2", "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Nine times seven?"}],
     "choices": ["A", "B", "C", "D"], "answer": "B"},
    {"id": "q3", "prompt": "Who sings at midnight?", "choices": [" the cat", " my grandmother — slowly", " the harbour"], "answer": " the harbour"},
    {"id": "q4", "question": "Paint the gate.\nWhich colour?", "choices": ["é", "red, of course: red"], "answer": 1},
]


def turns(row):
    return row.get("messages") or [{"role": "user", "content": row.get("question") or row["prompt"]}]


def log_likelihoods(model, tok, row):
    prompt = tok.apply_chat_template(turns(row), tokenize=False, add_generation_prompt=True)
    start = len(tok(prompt, add_special_tokens=False)["input_ids"])
    sums, counts = [], []
    for choice in row["choices"]:
        ids = tok(prompt + choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        counts.append(len(ids) - start)
    return sums, counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = {"questions": QUESTIONS}
    for case in CASES:
        folder = HERE / case / "model"
        options = {"experts_implementation": "eager"} if case == "olmoe" else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
        model.eval().to(torch.float64)
        tok = AutoTokenizer.from_pretrained(folder)
        results = [log_likelihoods(model, tok, row) for row in QUESTIONS]
        out[case] = {"log_likelihoods": [sums for sums, _ in results], "tokens": [counts for _, counts in results]}
    (HERE / "choices.json").write_text(json.dumps(out, indent=1) + "\n")
