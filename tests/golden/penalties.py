"""Writes penalties.json: greedy answers of transformers' `generate` with `repetition_penalty` and `no_repeat_ngram_size`.

    python tests/golden/penalties.py        # needs transformers 5.17

The two highest logits of every step differ by more than 1e-3, so that rounding chooses no other token.
"""

import json
import pathlib

import torch
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
MODEL = "olmoe"
TOKENS = 12
PENALTIES = [(1.5, 0), (0.8, 0), (1.0, 2), (1.2, 1), (1.1, 3)]


def answer(model, prompt, penalty, size):
    """The answer, and the smallest gap between the two highest logits."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=TOKENS,
        repetition_penalty=penalty,
        no_repeat_ngram_size=size,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = [scores[0].topk(2).values for scores in out.scores]
    return out.sequences[0, len(prompt) :].tolist(), min(float(a - b) for a, b in best)


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(HERE / MODEL / "model", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    cases = []
    for penalty, size in PENALTIES:
        found = []
        while len(found) < 6:
            prompt = torch.randint(model.config.vocab_size, (4 + len(found),), generator=generator).tolist()
            ids, gap = answer(model, prompt, penalty, size)
            if gap > 1e-3:
                found.append({"prompt": prompt, "answer": ids})
        cases.append({"repetition_penalty": penalty, "no_repeat_ngram_size": size, "answers": found})
    lines = ",\n".join(json.dumps(case) for case in cases)
    about = json.dumps("written by penalties.py with transformers 5.17")
    (HERE / "penalties.json").write_text(f'{{"about": {about}, "model": {json.dumps(MODEL)}, "cases": [\n{lines}\n]}}\n')
