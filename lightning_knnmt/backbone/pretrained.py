"""What all pretrained Hugging Face models share: where keys are read, where neighbors are mixed in, fine-tuning."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.families import Family, logits_bias
from lightning_knnmt.backbone.fine_tuning import freeze_below_output, frozen_fingerprint, saved_state
from lightning_knnmt.backbone.fingerprint import model_fingerprint, tokenizer_fingerprint
from lightning_knnmt.backbone.hub import device_of
from lightning_knnmt.backbone.int8 import quantize_linears
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.tap import KeysReached, KeyTap, tap_input


class PretrainedModel(KeyedModel):
    """Base of models that Hugging Face loads; a subclass loads `model` and sets `family` and `tokenizer`.

    Attributes:
        model: The Hugging Face model.
        family: Where its parts are.
        frozen: Whether only the way from the last decoder block to the logits can be trained.
    """

    model: PreTrainedModel
    family: Family

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.frozen = False
        self._place = device_of("cpu" if config.quantization == "int8" else config.device)

    def place(self, model: PreTrainedModel) -> None:
        """Take a loaded model, for evaluation, to its device."""
        self.model = model.eval()
        for name in model._keys_to_ignore_on_save or ():  # tables that are computed anew at each loading
            model.get_parameter(name).requires_grad_(False)
        self.to(self._place)
        if self.config.quantization == "int8":
            quantize_linears(model, self.output_projection)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """Type of the output projection's weights, which is that of the keys."""
        return str(self.output_projection.weight.dtype).removeprefix("torch.")

    @property
    def key_size(self) -> int:
        """D, the number of a key's dimensions."""
        return int(self.output_projection.weight.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """V, the number of the output projection's rows."""
        return int(self.output_projection.weight.shape[0])

    @property
    def output_projection(self) -> nn.Linear:
        """The layer that turns decoder outputs into logits."""
        return cast(nn.Linear, self.family.output_projection(self.model))  # or a wrapper with the same attributes

    @cached_property
    def model_fingerprint(self) -> str:
        """SHA-256 of the weight files; where keys are `ffn_residual`, of what lies below the trained part only."""
        return self.frozen_fingerprint if self.config.key_type == "ffn_residual" else model_fingerprint(self.name)

    @cached_property
    def frozen_fingerprint(self) -> str:
        """SHA-256 of the weights below the part that `freeze_below_output` leaves trainable."""
        return frozen_fingerprint(self.model, self.family)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary and normalisation."""
        return tokenizer_fingerprint(self.tokenizer)

    def tap(self, stop: bool = False) -> AbstractContextManager[KeyTap]:
        """Listen to the keys of every forward pass within the block.

        Args:
            stop: End each forward pass with `KeysReached` as soon as its keys are there.

        Returns:
            A context that gives the tap; its `keys` have the shape (B, T, D) of the latest pass.
        """
        if self.config.key_type == "decoder_output":
            return tap_input(self.output_projection, stop=stop)
        where = self.family.residual if self.config.key_type == "ffn_residual" else self.family.feed_forward
        return tap_input(where(self.model), self.family.time_first, stop)

    def keys(self, batch: Batch) -> Tensor:
        """Keys of a teacher-forced pass: position t holds the state that predicts label t.

        Args:
            batch: B sentences with labels of shape (B, T).

        Returns:
            Shape (B, T, D), in the model's type; positions where the label is padding have no meaning.
        """
        with self.tap(stop=True) as tap, suppress(KeysReached):
            self(batch)
        return tap.latest

    def keys_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and logits of one teacher-forced pass, shapes (B, T, D) and (B, T, V)."""
        with self.tap() as tap:
            logits = self(batch)
        return tap.latest, logits

    def project(self, states: Tensor) -> Tensor:
        """Logits of decoder outputs: (..., D) -> (..., V)."""
        if (weights := self.projection_weights()) is not None:
            return F.linear(states, *weights)
        constant, logits = logits_bias(self.model), self.output_projection(states)  # with an adapter beside its weight
        return logits if constant is None else logits + constant.view(-1)

    def projection_weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (V, D) and bias (V,) of the output projection; None with an adapter beside its weight."""
        projection, constant = self.output_projection, logits_bias(self.model)
        if not isinstance(projection, nn.Linear):
            return None
        return projection.weight, projection.bias if constant is None else constant.view(-1)

    def outputs(self, states: Tensor) -> Tensor:
        """Decoder outputs of `ffn_residual` states, by the part of the model that `freeze_below_output` trains.

        Args:
            states: Shape (..., D).

        Returns:
            Shape (..., D): what the output projection sees, as if the whole model had run.
        """
        return self.family.outputs(self.model, states)

    @contextmanager
    def mixing(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Let a function change the logits that the model returns, in every forward pass within the block.

        Beam search, sampling, forced tokens and every other option of `generate` act on what it gives.

        Args:
            mix: Takes queries (R, D) and logits (R, V) of the last position, which it may overwrite, and the tokens
                that the pass reads, shape (R, T), and gives logits (R, V): `generate` copies the logits before it uses
                them, and nobody else holds them.
        """
        with self.tap() as tap:

            def change(_: nn.Module, __: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
                tokens = options["decoder_input_ids" if "decoder_input_ids" in options else "input_ids"]
                mixed = mix(tap.latest[:, -1], output.logits[:, -1], tokens)  # of [R, T, ·]; T > 1 without a cache
                output.logits = mixed.unsqueeze(1)  # [R, V] -> [R, 1, V]
                return output

            handle = self.model.register_forward_hook(change, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def freeze_below_output(self, adapter_rank: int | None = None) -> None:
        """Leave only the way from the last decoder block to the logits trainable, as in arXiv 2509.16729.

        Trainable are the feed-forward layers of the last decoder block, the norm that makes the decoder's outputs, and
        the output projection, which is untied from the embeddings. In training mode the last block keeps its dropout;
        everything before it runs as in decoding, so that what is trained sees the states that it will see.

        Args:
            adapter_rank: Train low-rank adapters of that rank (LoRA, arXiv 2106.09685) in place of the linear layers'
                weights.
        """
        freeze_below_output(self.model, self.family, adapter_rank)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off; in what is frozen it stays off."""
        super().train(mode)
        if mode and self.frozen:
            self.model.eval()
            self.family.last_block(self.model).train()
        return self

    def save(self, folder: Path) -> None:
        """Write the model, adapters merged, and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder, state_dict=saved_state(self.model))
        self.tokenizer.save_pretrained(folder)
