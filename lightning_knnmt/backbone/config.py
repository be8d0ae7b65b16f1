"""Which model, and how it is loaded: the same options for every script and for training."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_knnmt.checks import check_one_of

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel

KeyType = Literal["decoder_output", "ffn_input", "ffn_residual"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8"]


@dataclass(frozen=True)
class BackboneConfig:
    """A pretrained model and how it is loaded.

    Attributes:
        model: Hub name or folder of a model, or a .gguf file of a language model.
        key_type: `decoder_output`: what the output projection sees (arXiv 2509.16729). `ffn_input`: what the last
            decoder block's feed-forward layer sees (arXiv 2010.00710). `ffn_residual`: the residual stream that enters
            that layer, from which the trained part of a fine-tuned model follows (docs/dispersion.md).
        src_lang: Language code of the source, for multilingual models.
        tgt_lang: Language code of the target, for multilingual models; decoding begins with it.
        dtype: Type of the weights.
        device: `auto`: the GPU if there is one.
        src_prefix: Put before every source, such as T5's `translate German to English: `.
        sentences: Languages, such as `en-pt`, by whose rules texts are cut into sentences, each translated and stored
            alone; `auto`: as the model's family is used to; `none`: texts are taken whole.
        quantization: `int8`: on a CPU, linear layers, and the output projection in decoding, compute in 8-bit integers,
            faster and less exactly; build datastores without it.
        model_class: Class path of a `KeyedModel` of your own, made with this configuration; None: chosen by the model.
    """

    model: str
    key_type: KeyType = "decoder_output"
    src_lang: str | None = None
    tgt_lang: str | None = None
    dtype: Dtype = "float32"
    device: str = "auto"
    src_prefix: str = ""
    sentences: str = "auto"
    model_class: str | None = None
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))  # a path is taken where a name is
        check_one_of(get_args(KeyType), key_type=self.key_type)
        check_one_of(get_args(Dtype), dtype=self.dtype)
        check_one_of(get_args(Quantization), quantization=self.quantization)
        if self.quantization != "none" and (self.dtype != "float32" or self.device not in ("auto", "cpu")):
            raise ValueError(
                f"quantization is {self.quantization} with dtype {self.dtype} and device {self.device}, "
                "expected dtype float32 and device auto or cpu"
            )

    def load(self) -> "KeyedModel":
        """Load the model.

        Raises:
            ValueError: An option does not fit the model.
            OSError: There is no such folder, and the hub has no such model or cannot be reached.
        """
        from lightning_knnmt.backbone.families import model_class_of

        made = model_class_of(self.model) if self.model_class is None else _class_at(self.model_class)
        return made(self)


def _class_at(path: str) -> "type[KeyedModel]":
    from lightning_knnmt.backbone.keyed_model import KeyedModel

    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model_class is {path!r}, which cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, KeyedModel)):
        raise ValueError(f"model_class is {path!r}, expected a subclass of lightning_knnmt.backbone.KeyedModel")
    return found


def load_model(model: str, **options: Any) -> "KeyedModel":
    """Load a pretrained model.

    Args:
        model: Hub name or folder.
        options: Those of `BackboneConfig`, such as `key_type`, `device` or languages.

    Raises:
        ValueError: An option does not fit the model.
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
    """
    return BackboneConfig(model, **options).load()
