"""A plain Accelerate script that knows nothing of dist-train: a small classifier on generated rows.

python docs/examples/accelerate_script.py
dist-train launch --gpus-per-node 2 docs/examples/accelerate_script.py -- --steps 40
dist-train launch --gpus-per-node 2 --strategy zero2 docs/examples/accelerate_script.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, ROWS = 32, 4, 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--output", help="folder for the trained weights")
    arguments = parser.parse_args()

    set_seed(0)
    rows = torch.randn(ROWS, FEATURES)
    labels = (rows @ torch.randn(FEATURES, CLASSES)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, CLASSES))

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    batches = DataLoader(TensorDataset(rows, labels), batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.print(
        f"{accelerator.num_processes} x {accelerator.device.type}, "
        f"{accelerator.distributed_type.value}, {accelerator.mixed_precision}"
    )

    step = 0
    while step < arguments.steps:
        for features, label in batches:
            loss = nn.functional.cross_entropy(model(features), label)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                mean = accelerator.gather(loss.detach()[None]).mean().item()
                accelerator.print(f"step {step}  loss {mean:.4f}")
            if step == arguments.steps:
                break

    if arguments.output:
        accelerator.save_model(model, arguments.output)
    accelerator.print("trained")


if __name__ == "__main__":
    main()
