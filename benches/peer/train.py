#!/usr/bin/env python3
"""Training steps of selected experts with PyTorch and Hugging Face transformers, as fast as we could make them.

`python train.py --model DIR --rows FILE --every 16` trains every 16th expert of each layer: a step is the gradient of the mean
cross-entropy of all targets, by micro-batches, and an update by AdamW. Prints one JSON object as identify.py does, whose options
it shares; `seconds` is that of the fastest step.

transformers stores all experts of a layer in one parameter, so gradients of all its experts are computed. A hook adds the
selected slices to f32 gradients of f32 masters and frees the rest; fused AdamW updates the masters, which are copied back. All other
settings are those of identify.py.
"""

import json
import time

import torch

from identify import loss_of, measured, open_inputs, parser_of


class Masters:
    """f32 masters of every nth expert, with their gradients."""

    def __init__(self, model, every):
        model.requires_grad_(False)
        self.masters, self.places = [], []
        for layer in model.model.layers:
            index = torch.arange(0, layer.mlp.experts.num_experts, every)
            for p in layer.mlp.experts.parameters():
                p.requires_grad_(True)
                master = torch.nn.Parameter(p.detach()[index].float())
                master.grad = torch.zeros_like(master)
                self.masters.append(master)
                self.places.append((p, index))
                p.register_post_accumulate_grad_hook(self.hook(master, index))
        self.optimizer = torch.optim.AdamW(self.masters, lr=5e-5, weight_decay=0.01, fused=True)

    @staticmethod
    def hook(master, index):
        def take(p):
            master.grad += p.grad[index]
            p.grad = None

        return take

    @torch.no_grad()
    def update(self):
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for (p, index), master in zip(self.places, self.masters):
            p.index_copy_(0, index, master.to(p.dtype))
            master.grad.zero_()


def step(model, batches, targets_of_all, a):
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch, a, "sum") / targets_of_all
        loss.backward()
        total += loss.item()
    return total


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--every", type=int, default=16, help="train every nth expert of each layer")
    a = parser.parse_args()
    rows, model, batches = open_inputs(a)
    masters, targets = Masters(model, a.every), sum(r["loss"] for r in rows)
    times, losses = [], []
    for _ in range(a.repeat):
        begin = time.perf_counter()
        losses.append(step(model, batches, targets, a))
        masters.update()
        times.append(time.perf_counter() - begin)
    print(json.dumps(measured(a, rows, batches, times) | {"losses": losses}, indent=1))


if __name__ == "__main__":
    main()
