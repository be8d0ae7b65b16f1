"""Models of the Firefox Translations and Bergamot projects as Hugging Face models; importing this makes them known."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_knnmt.backbone.firefox.cache import FirefoxCache
from lightning_knnmt.backbone.firefox.configuration import FirefoxConfig
from lightning_knnmt.backbone.firefox.modeling import FirefoxForConditionalGeneration
from lightning_knnmt.backbone.firefox.tokenization import FirefoxTokenizer

AutoConfig.register(FirefoxConfig.model_type, FirefoxConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(FirefoxConfig, FirefoxForConditionalGeneration, exist_ok=True)
AutoTokenizer.register(FirefoxConfig, slow_tokenizer_class=FirefoxTokenizer, exist_ok=True)

__all__ = ["FirefoxCache", "FirefoxConfig", "FirefoxForConditionalGeneration", "FirefoxTokenizer"]
