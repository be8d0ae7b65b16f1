import importlib.util
import json
import logging
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_knnmt.evaluation.comet import CometScorer, CometUnavailableError

needs_comet = pytest.mark.skipif(
    importlib.util.find_spec("comet") is None or importlib.util.find_spec("entmax") is None,
    reason="COMET is not installed: pip install --no-deps unbabel-comet entmax",
)

SOURCES = [
    "Nehmen Sie jeden Morgen eine Tablette mit einem Glas Wasser ein.",
    "Fragen Sie Ihren Arzt, wenn Sie schwanger sind.",
    "Nicht über 25 °C lagern.",
    "Die häufigsten Nebenwirkungen sind Kopfschmerzen und Übelkeit.",
    "Das Verfallsdatum bezieht sich auf den letzten Tag des Monats.",
    "Dieses Arzneimittel enthält Lactose.",
    "Bewahren Sie dieses Arzneimittel für Kinder unzugänglich auf.",
]
HYPOTHESES = [
    "Take one tablet every morning with a glass of water.",
    "Ask your doctor if you are pregnant.",
    "Do not keep over 25 °C.",
    "The most common side effects are headache and sickness.",
    "The expiry date is about the month's last day.",
    "This medicine contains lactose.",
    "Keep this drug away from children.",
]
REFERENCES = [
    "Take one tablet each morning with a glass of water.",
    "Ask your doctor for advice if you are pregnant.",
    "Do not store above 25 °C.",
    "The most common side effects are headache and nausea.",
    "The expiry date refers to the last day of that month.",
    "This medicine contains lactose.",
    "Keep this medicine out of the sight and reach of children.",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.setenv("HOME", str(tmp_path))  # COMET makes a cache folder there


def _save_encoder(folder: Path) -> None:
    """A tokenizer trained on the sentences above, and the settings of an XLM-R of two layers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaConfig, XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(SOURCES + HYPOTHESES + REFERENCES, trainer)
    vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    XLMRobertaTokenizer(vocab=vocab).save_pretrained(folder)
    XLMRobertaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        initializer_range=0.5,
    ).save_pretrained(folder)


def _save_checkpoint(model: Any, folder: Path, class_identifier: str = "regression_metric") -> Path:
    """The layout that COMET publishes: hparams.yaml beside checkpoints/model.ckpt."""
    import pytorch_lightning

    hparams = dict(model.hparams) | {"class_identifier": class_identifier}
    checkpoint = folder / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    (folder / "hparams.yaml").write_text(json.dumps(hparams), encoding="utf-8")  # JSON is YAML
    contents = {
        "state_dict": model.state_dict(),
        "hyper_parameters": hparams,
        "pytorch-lightning_version": pytorch_lightning.__version__,
    }
    torch.save(contents, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a COMET regression model with random weights."""
    from comet.models import RegressionMetric

    folder = tmp_path_factory.mktemp("comet")
    _save_encoder(folder / "encoder")
    torch.manual_seed(0)
    model = RegressionMetric(
        pretrained_model=str(folder / "encoder"),
        load_pretrained_weights=False,
        local_files_only=True,
        hidden_sizes=[32, 16],
        layer_transformation="sparsemax",
    )
    for weight, value in zip(model.layerwise_attention.scalar_parameters, (0.3, -0.2, 0.1), strict=True):
        torch.nn.init.constant_(weight, value)
    return _save_checkpoint(model, folder / "tiny")


def _mean_pooled_by_hand(model: Any, texts: list[str]) -> torch.Tensor:
    """Sentence vectors [B, D] from Hugging Face's own hidden states, one sentence at a time, so without padding."""
    mixture = model.layerwise_attention
    weights = mixture.transform_fn(torch.cat(list(mixture.scalar_parameters)), dim=0)
    assert weights.unique().numel() == 3
    rows = []
    for text in texts:
        tokens = model.encoder.tokenizer(text, return_tensors="pt")
        layers = torch.stack(model.encoder.model(**tokens, output_hidden_states=True).hidden_states)
        normed = (layers - layers.mean((2, 3), keepdim=True)) / layers.std((2, 3), correction=0, keepdim=True)
        rows.append(mixture.gamma * (weights[:, None, None, None] * normed).sum(0).mean(1)[0])
    return torch.stack(rows)


@needs_comet
def test_segment_scores_are_those_of_the_model_computed_by_hand(tiny: Path):
    scorer = CometScorer(str(tiny), batch_size=3, device="cpu")
    model = scorer._scorer
    with torch.no_grad():
        vectors = [_mean_pooled_by_hand(model, texts) for texts in (SOURCES, HYPOTHESES, REFERENCES)]
        expected = model.estimate(*vectors).score
    scores = torch.tensor(scorer.segment_scores(SOURCES, HYPOTHESES, REFERENCES))
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@needs_comet
def test_segment_scores_are_those_of_the_models_own_forward(tiny: Path):
    scorer = CometScorer(str(tiny), batch_size=len(SOURCES), device="cpu")
    rows = zip(SOURCES, HYPOTHESES, REFERENCES, strict=True)
    inputs = scorer._scorer.prepare_sample([{"src": s, "mt": h, "ref": r} for s, h, r in rows], stage="predict")
    with torch.no_grad():
        expected = scorer._scorer(**inputs).score
    scores = torch.tensor(scorer.segment_scores(SOURCES, HYPOTHESES, REFERENCES))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@needs_comet
def test_score_is_the_finite_mean_and_names_its_model(tiny: Path):
    scorer = CometScorer(str(tiny), device="cpu")
    score = scorer.score(SOURCES, HYPOTHESES, REFERENCES)
    assert score.name == "COMET"
    assert math.isfinite(score.value)
    segments = scorer.segment_scores(SOURCES, HYPOTHESES, REFERENCES)
    assert score.value == pytest.approx(sum(segments) / len(segments))
    assert score.signature.startswith(f"model:{tiny}|version:")


@needs_comet
def test_scores_are_deterministic_and_do_not_depend_on_the_order(tiny: Path):
    rows = list(zip(SOURCES, HYPOTHESES, REFERENCES, strict=True))
    shuffled = random.Random(1).sample(rows, len(rows))
    assert shuffled != rows
    first = CometScorer(str(tiny), batch_size=3, device="cpu")
    again = CometScorer(str(tiny), batch_size=3, device="cpu")
    scores = dict(zip(rows, first.segment_scores(*map(list, zip(*rows, strict=True))), strict=True))
    assert dict(zip(shuffled, again.segment_scores(*map(list, zip(*shuffled, strict=True))), strict=True)) == scores
    assert again.score(*map(list, zip(*shuffled, strict=True))) == first.score(SOURCES, HYPOTHESES, REFERENCES)


@needs_comet
def test_batch_size_changes_nothing_but_rounding(tiny: Path):
    one, many = (CometScorer(str(tiny), batch_size=size, device="cpu") for size in (1, 7))
    scores = one.segment_scores(SOURCES, HYPOTHESES, REFERENCES)
    assert many.segment_scores(SOURCES, HYPOTHESES, REFERENCES) == pytest.approx(scores, rel=1e-4, abs=1e-5)


@needs_comet
def test_lengths_that_differ_are_named(tiny: Path):
    scorer = CometScorer(str(tiny), device="cpu")
    with pytest.raises(ValueError, match="there are 7 sources, 6 hypotheses, 7 references, expected the same number"):
        scorer.score(SOURCES, HYPOTHESES[:-1], REFERENCES)


@needs_comet
def test_importing_comet_leaves_the_root_logger_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "comet"]:
        monkeypatch.delitem(sys.modules, name)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # basicConfig acts only on a logger without handlers
    level = root.level
    CometScorer(str(tiny), device="cpu")
    assert root.handlers == []
    assert root.level == level


@needs_comet
def test_unreachable_hub_is_an_error_of_its_own():
    with pytest.raises(
        CometUnavailableError, match=r"Unbabel/wmt22-comet-da could not be downloaded \(LocalEntry.*ckpt"
    ):
        CometScorer("Unbabel/wmt22-comet-da")


@needs_comet
def test_unreachable_encoder_is_the_same_error(tiny: Path, tmp_path: Path):
    folder = tmp_path / "moved"
    shutil.copytree(tiny.parents[1], folder)
    contents = torch.load(folder / "checkpoints" / "model.ckpt")
    contents["hyper_parameters"]["pretrained_model"] = "xlm-roberta-large"
    torch.save(contents, folder / "checkpoints" / "model.ckpt")
    with pytest.raises(CometUnavailableError, match=r"model\.ckpt could not load the encoder it builds on \(OSError"):
        CometScorer(str(folder / "checkpoints" / "model.ckpt"))


@needs_comet
def test_checkpoint_that_lacks_parameters_is_refused(tiny: Path, tmp_path: Path):
    folder = tmp_path / "partial"
    shutil.copytree(tiny.parents[1], folder)
    contents = torch.load(folder / "checkpoints" / "model.ckpt")
    del contents["state_dict"]["estimator.ff.0.weight"]
    torch.save(contents, folder / "checkpoints" / "model.ckpt")
    with pytest.raises(ValueError, match=r"lacks 1 of the model's parameters, estimator\.ff\.0\.weight among them"):
        CometScorer(str(folder / "checkpoints" / "model.ckpt"))


@needs_comet
def test_checkpoint_with_pickled_objects_says_how_to_trust_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny.parents[1], folder)
    checkpoint = folder / "checkpoints" / "model.ckpt"
    torch.save(torch.load(checkpoint) | {"callbacks": {"dirpath": tmp_path}}, checkpoint)
    with pytest.raises(CometUnavailableError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"):
        CometScorer(str(checkpoint))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert math.isfinite(CometScorer(str(checkpoint)).score(SOURCES, HYPOTHESES, REFERENCES).value)


@needs_comet
def test_model_without_references_is_refused(tiny: Path, tmp_path: Path):
    from comet.models import ReferencelessRegression

    model = ReferencelessRegression(
        pretrained_model=str(tiny.parents[2] / "encoder"),
        load_pretrained_weights=False,
        local_files_only=True,
        hidden_sizes=[32, 16],
    )
    checkpoint = _save_checkpoint(model, tmp_path / "referenceless", "referenceless_regression_metric")
    with pytest.raises(ValueError, match="is a ReferencelessRegression, expected a RegressionMetric"):
        CometScorer(str(checkpoint))


@needs_comet
def test_missing_files_are_named(tiny: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt, expected the file of a COMET checkpoint"):
        CometScorer(str(tmp_path / "nowhere.ckpt"))
    with pytest.raises(FileNotFoundError, match="expected the file of a COMET checkpoint"):
        CometScorer(str(tiny.parent))
    bare = tmp_path / "bare" / "checkpoints" / "model.ckpt"
    bare.parent.mkdir(parents=True)
    shutil.copy(tiny, bare)
    with pytest.raises(FileNotFoundError, match=r"expected its settings at .*bare/hparams\.yaml"):
        CometScorer(str(bare))


@pytest.mark.parametrize("package", ["comet", "entmax"])
def test_missing_package_says_how_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install --no-deps unbabel-comet entmax"):
        CometScorer("Unbabel/wmt22-comet-da")


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size is 0, expected 1 or more"):
        CometScorer("Unbabel/wmt22-comet-da", batch_size=0)
