"""Fine-tuning and new keys from stored states against running the model: ``python benchmarks/stored_states.py``.

The same optimizer steps (last block, cross-entropy, sliced dispersion) on the same pairs, with the whole model and on
stored states, in turn; then the keys of all pairs by the whole model and from the states. ``ratio`` is how many times
as long a step takes with the whole model, states not counted; storing them takes about as long as a datastore.
``--model …gguf --data data/help_pages`` measures a language model.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.building.config import DatastoreConfig, RekeyConfig
from lightning_knnmt.building.datastore import build_datastore
from lightning_knnmt.building.rekey import rekey
from lightning_knnmt.data.batching import TokenBudgetSampler
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.dispersion import SlicedDispersion
from lightning_knnmt.training import Schedule, TranslationModule
from lightning_knnmt.training.datamodule import TokenizedPairs
from lightning_knnmt.training.stored_states import StateBatch, StoredStates


class Trainee:
    """A model in training, with its optimizer: a step is what a `training_step` of the module does.

    Args:
        model: Name, folder or .gguf file.
    """

    def __init__(self, model: str) -> None:
        self.module = TranslationModule(
            BackboneConfig(model), Schedule(3e-4, 1), 0.0, "last_block", dispersion=SlicedDispersion(), gamma=1.0
        )
        self.module.train()
        self.optimizer: Any = self.module.configure_optimizers()["optimizer"]

    @property
    def model(self) -> PretrainedModel:
        """The model."""
        assert isinstance(self.module.backbone, PretrainedModel)
        return self.module.backbone

    def step(self, batch: Any) -> int:
        """One optimizer step; returns the batch's target tokens."""
        states, labels = self.module.states(batch.to(self.model.device))
        loss = F.cross_entropy(self.model.project(states).float(), labels)
        assert self.module.dispersion is not None
        (loss + self.module.gamma * self.module.dispersion(states)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(labels)


def write_pairs(path: Path, pairs: list[Pair]) -> CorpusFile:
    """A corpus of some pairs."""
    lines = (json.dumps({"src": pair.src, "tgt": pair.tgt}, ensure_ascii=False) for pair in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return CorpusFile(path)


def measure_steps(
    model: str, states: StoredStates, pairs: TokenizedPairs, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a step with the whole model and on stored states, in turn, on batches of the same size."""
    whole, stored = Trainee(model), Trainee(model)
    batches = list(TokenBudgetSampler(states.lengths, options.max_tokens))[: options.steps + 1]
    times: dict[str, list[float]] = {"whole model": [], "stored states": []}
    tokens = []
    for number, rows in enumerate(batches):
        texts = [pairs[row] for row in rows]
        read = time.perf_counter()
        small: StateBatch = states.collate([states[row] for row in rows])
        read = time.perf_counter() - read
        large = collate([src for src, _ in texts], [tgt for _, tgt in texts], whole.model.pad_id)
        for name, trainee, batch, extra in (("whole model", whole, large, 0.0), ("stored states", stored, small, read)):
            start = time.perf_counter()
            count = trainee.step(batch)
            if number:  # the first is a warm-up
                times[name].append(1000 * (time.perf_counter() - start + extra))
        if number:
            tokens.append(count)
    return {
        "steps": len(tokens), "tokens_per_step": statistics.mean(tokens),
        "median_ms": {name: statistics.median(each) for name, each in times.items()},
        "seconds_for_1000_steps": {name: statistics.mean(each) for name, each in times.items()},
    }  # fmt: skip


def timed(work: Any) -> float:
    """Seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements."""
    torch.manual_seed(1)
    model: KeyedModel = load_model(str(options.model))
    below: KeyedModel = load_model(str(options.model), key_type="ffn_residual")
    pairs = list(model.split_pairs(read_pairs(CorpusFile(options.data / "train.jsonl"))))
    keep = max(1, len(pairs) // options.pairs)
    pairs = pairs[::keep][: options.pairs]
    corpus = write_pairs(folder / "pairs.jsonl", pairs)
    config = DatastoreConfig(folder / "store", corpus, max_tokens=options.batch_tokens)
    seconds = {"store states": 0.0, "build store": 0.0, "rekey store": 0.0}
    seconds["store states"] = timed(
        lambda: build_datastore(below, DatastoreConfig(folder / "states", corpus, config.max_tokens))
    )
    seconds["build store"] = timed(lambda: build_datastore(model, config))
    assert isinstance(model, PretrainedModel)
    seconds["rekey store"] = timed(lambda: rekey(model, RekeyConfig(folder / "states", folder / "rekeyed")))
    stored = StoredStates(folder / "states", model)
    ids = model.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs])
    steps = measure_steps(str(options.model), stored, TokenizedPairs(ids.src, ids.tgt), options)
    ratio = steps["median_ms"]["whole model"] / steps["median_ms"]["stored states"]
    return {
        "ratio": ratio, "steps": steps, "seconds": seconds, "entries": sum(stored.lengths),
        "rekey_ratio": seconds["build store"] / seconds["rekey store"],
        "bytes_per_state": 4 * model.key_size, "model": str(options.model), **common.environment(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"))
    parser.add_argument("--data", type=Path, default=Path("data/libreoffice_help"), help="folder with train.jsonl")
    parser.add_argument("--pairs", type=int, default=4000, help="that are stored and trained on")
    parser.add_argument("--steps", type=int, default=60, help="that are measured, of either kind")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a training batch")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of a batch when a store is built")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few steps and pairs, under a minute")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.steps = min(options.pairs, 200), min(options.steps, 7)
        options.max_tokens = min(options.max_tokens, 300)
    common.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    steps, seconds = result["steps"], result["seconds"]
    print("| | whole model | from stored states | ratio |\n|---|---|---|---|")
    whole, stored = (steps["median_ms"][name] for name in ("whole model", "stored states"))
    print(f"| step of {steps['tokens_per_step']:.0f} tokens, ms | {whole:.0f} | {stored:.0f} | {result['ratio']:.2f} |")
    build, again = seconds["build store"], seconds["rekey store"]
    print(f"| keys of {result['entries']:,} entries, s | {build:.1f} | {again:.1f} | {result['rekey_ratio']:.1f} |")
    print(f"\nstoring the states took {seconds['store states']:.1f} s, once")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
