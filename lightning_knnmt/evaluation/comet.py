"""COMET, the learned metric of Rei et al. (EMNLP 2020), from a hub name or a local checkpoint."""

import importlib
import logging
import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.evaluation.scores import Score, check_aligned

INSTALL = "pip install --no-deps unbabel-comet entmax && pip install pandas scipy"


class CometUnavailableError(RuntimeError):
    """The COMET model could not be had: an evaluation can note it and go on with its other scores."""


class CometScorer:
    """Scores translations against source and reference by one COMET regression model.

    The forward pass runs here, batch by batch, and not in ``model.predict``, which starts a Lightning trainer with
    its own workers and logs. Segments are batched by length and text, so a score does not depend on their order.

    Args:
        model: Hub name, such as ``Unbabel/wmt22-comet-da``, or path of a checkpoint (``.ckpt``) whose parent folder's
            parent holds ``hparams.yaml``.
        batch_size: Segments a batch.
        device: Where the model runs; ``auto`` takes the GPU where there is one.

    Raises:
        ImportError: COMET is not installed.
        FileNotFoundError: ``model`` is a path and the checkpoint or its ``hparams.yaml`` is missing.
        CometUnavailableError: The model, or the encoder it builds on, can be neither downloaded nor read.
        ValueError: ``batch_size`` is not positive, or the model does not score source, translation and reference.
    """

    def __init__(self, model: str, batch_size: int = 16, device: str = "auto") -> None:
        check_at_least(1, batch_size=batch_size)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model
        self.batch_size = batch_size
        self.device = torch.device(device)
        comet = _import_comet()
        self._scorer = _load(comet, model, _checkpoint_path(comet, model)).to(self.device)
        self.signature = f"model:{model}|version:{comet.__version__}"

    def score(self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> Score:
        """Average the segment scores, as COMET's system score does.

        Args:
            sources: Source segments.
            hypotheses: Detokenized translations, one a source.
            references: Detokenized references, one a source.

        Returns:
            The mean score in the model's own scale (published models: about 0 to 1) with model and version.

        Raises:
            ValueError: The lists are empty, or differ in length.
        """
        segments = self.segment_scores(sources, hypotheses, references)
        return Score("COMET", math.fsum(segments) / len(segments), self.signature)

    def segment_scores(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]
    ) -> list[float]:
        """Score each segment by itself.

        Args:
            sources: Source segments.
            hypotheses: Detokenized translations, one a source.
            references: Detokenized references, one a source.

        Returns:
            One score a segment, in the order given.

        Raises:
            ValueError: The lists are empty, or differ in length.
        """
        check_aligned(sources=sources, hypotheses=hypotheses, references=references)
        segments = list(zip(sources, hypotheses, references, strict=True))
        order = sorted(range(len(segments)), key=lambda i: (sum(map(len, segments[i])), segments[i]))
        scores = [0.0] * len(segments)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]  # [row of the batch -> segment]
            for row, value in zip(rows, self._forward([segments[row] for row in rows]), strict=True):
                scores[row] = value
        return scores

    @torch.inference_mode()
    def _forward(self, batch: Sequence[tuple[str, str, str]]) -> list[float]:
        samples = [{"src": src, "mt": mt, "ref": ref} for src, mt, ref in batch]
        inputs = self._scorer.prepare_sample(samples, stage="predict")
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self._scorer(**inputs).score.float().tolist()


def _import_comet() -> ModuleType:
    """Import COMET and leave the root logger as it was: the package turns it to INFO for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        comet = importlib.import_module("comet")
        importlib.import_module("entmax")  # imported by COMET only once a model asks for sparsemax, as most do
    except ImportError as error:
        raise ImportError(
            f"COMET scores need unbabel-comet and entmax, which could not be imported ({error}). Install them "
            f"with `{INSTALL}`: COMET's own pins would replace the versions this project runs on."
        ) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return comet


def _checkpoint_path(comet: ModuleType, model: str) -> Path:
    """Find the checkpoint on disk, downloading it where `model` is a hub name."""
    path = Path(model)
    if path.suffix == ".ckpt" or path.exists():
        if not path.is_file():
            raise FileNotFoundError(
                f"model is {model}, expected the file of a COMET checkpoint: give the path of its .ckpt, or a hub name "
                "such as Unbabel/wmt22-comet-da"
            )
        hparams = path.absolute().parents[1] / "hparams.yaml"
        if not hparams.is_file():
            raise FileNotFoundError(
                f"model is {model}, expected its settings at {hparams}: keep COMET's layout, "
                "NAME/hparams.yaml beside NAME/checkpoints/model.ckpt"
            )
        return path.absolute()
    try:
        return Path(comet.download_model(model))
    except (KeyError, OSError) as error:
        raise _unavailable(model, "be downloaded", error) from error


def _load(comet: ModuleType, model: str, checkpoint: Path) -> Any:
    """Load a checkpoint for scoring, and refuse one whose scores would mean nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            scorer = comet.load_from_checkpoint(str(checkpoint))
        except pickle.UnpicklingError as error:
            raise CometUnavailableError(
                f"The COMET checkpoint {checkpoint} is damaged, or holds objects that torch.load refuses to read by "
                "default. If you trust where it came from, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 and run again."
            ) from error
        except OSError as error:  # the encoder's tokenizer and settings come from the hub too
            raise _unavailable(model, "load the encoder it builds on", error) from error
    from comet.models import RegressionMetric

    if not isinstance(scorer, RegressionMetric) or not scorer.requires_references():
        raise ValueError(
            f"model {model} is a {type(scorer).__name__}, expected a RegressionMetric, which scores a translation "
            "against source and reference: use a model such as Unbabel/wmt22-comet-da"
        )
    missing = [name for name, _ in scorer.named_parameters() if any(f"'{name}'" in str(w.message) for w in caught)]
    if missing:
        raise ValueError(
            f"The COMET checkpoint {checkpoint} lacks {len(missing)} of the model's parameters, {missing[0]} among "
            "them; they would be random. Check that hparams.yaml belongs to the checkpoint."
        )
    scorer.encoder.model.register_forward_hook(_keep_pooler_slot)
    return scorer.eval()


def _keep_pooler_slot(module: torch.nn.Module, args: Any, output: Any) -> Any:
    """Give COMET the tuple it unpacks: last hidden state, pooler output, hidden states of all layers.

    transformers 5 leaves absent outputs out of its tuples, and COMET builds its encoders without a pooler.
    """
    if isinstance(output, tuple) and len(output) == 2:
        return output[0], None, output[1]
    return output


def _unavailable(model: str, what: str, error: BaseException) -> CometUnavailableError:
    cause = error
    while cause.__context__ is not None and type(cause) in (KeyError, Exception):  # COMET's, raised over the hub's own
        cause = cause.__context__
    reason = str(cause).strip().split("\n")[0]
    return CometUnavailableError(
        f"The COMET model {model} could not {what} ({type(cause).__name__}: {reason}). Check the name and the network, "
        "or copy the model here and give the path of its .ckpt file."
    )
