#!/usr/bin/env python3
"""Answers prompts with transformers' `generate`, greedily, in static batches padded on the left; prints CPU seconds, wall-clock
seconds and tokens as JSON."""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--answers", required=True, help="generations.jsonl of `moewarden eval`: its prompts are answered")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=a.model + "/tokenizer.json")
    rows = [json.loads(line) for line in open(a.answers)]
    prompts = [tokenizer.encode(row["prompt_text"], add_special_tokens=False) for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    eos = model.generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos])
    answers = [None] * len(prompts)
    start, clock = time.process_time(), time.perf_counter()
    for first in range(0, len(order), a.batch_size):
        batch = order[first : first + a.batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=a.max_new_tokens, pad_token_id=0
            )
        for i, row in zip(batch, out[:, width:].tolist()):
            end = next((t for t, token in enumerate(row) if token in eos), len(row))
            answers[i] = row[:end]
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    same = [tokenizer.decode(answer, skip_special_tokens=True) == row["response"] for answer, row in zip(answers, rows)]
    print(json.dumps({
        "seconds": seconds,
        "wall": wall,
        "tokens": [len(answer) for answer in answers],
        "same": sum(same),
        "of": len(rows),
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
