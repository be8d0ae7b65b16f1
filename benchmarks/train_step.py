"""Cost of a fine-tuning step by what is trained: ``python benchmarks/train_step.py --quick``.

A step is forward, backward and Adam on one batch of random tokens. The floor is what freezing allows: a forward pass
of the whole model without a graph, beside nothing that is learned.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.dispersion import Dispersion, SlicedDispersion
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.training import Schedule, TranslationModule
from lightning_knnmt.training.module import Trainable

FULL = "whole model"


def stepper(model: str, trainable: Trainable, dispersion: Dispersion | None, batch: Batch) -> Callable[[], None]:
    """A function that makes one optimizer step."""
    module = TranslationModule(BackboneConfig(model), Schedule(1e-4, 1), trainable=trainable, dispersion=dispersion)
    optimizer = module.configure_optimizers()["optimizer"]
    assert batch.labels is not None

    def step() -> None:
        states, labels = module.states(batch)
        loss = torch.nn.functional.cross_entropy(module.backbone.project(states).float(), labels, label_smoothing=0.1)
        if module.dispersion is not None:
            loss = loss + module.dispersion(states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def random_batch(module: TranslationModule, sentences: int, length: int, seed: int) -> Batch:
    """Sentences of one length, so that no padding stands in the way of comparing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sentences, length)
    tokens = [torch.randint(10, module.backbone.vocabulary_size, shape, generator=generator) for _ in range(2)]
    return Batch(tokens[0], torch.ones(shape, dtype=torch.long), tokens[1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step, and ratios to that of the whole model."""
    model = str(options.model)
    module = TranslationModule(BackboneConfig(model), Schedule(1e-4, 1))
    batch = random_batch(module, options.sentences, options.length, options.seed)

    @torch.inference_mode()
    def forward() -> None:
        module.backbone.project(module.states(batch)[0])

    work: dict[str, Callable[[], object]] = {
        FULL: stepper(model, "all", None, batch),
        "last block": stepper(model, "last_block", None, batch),
        "last block, sliced dispersion": stepper(model, "last_block", SlicedDispersion(), batch),
        "adapters, sliced dispersion": stepper(model, "adapters", SlicedDispersion(), batch),
        "forward only (floor)": forward,
    }
    times = common.interleaved(work, options.repeats, partial(torch.manual_seed, options.seed))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {
        "median_ms": medians,
        "ratios": {name: round(value / medians[FULL], 3) for name, value in medians.items()},
        "settings": {name: value for name, value in vars(options).items() if name != "json"} | {"model": model},
        **common.environment(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table and the ratio that counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"))
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--length", type=int, default=32, help="tokens of every sentence, on both sides")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three repeats on a small batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.sentences, options.repeats = min(options.sentences, 8), min(options.repeats, 3)
    common.set_threads(options.threads)
    result = measure(options)
    rows = [["trained", "median ms", "of the whole model"]]
    rows += [[name, f"{result['median_ms'][name]:.1f}", f"{ratio:.2f}"] for name, ratio in result["ratios"].items()]
    print(table(rows))
    print(f"ratio {result['ratios']['last block, sliced dispersion']}")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
