"""Where an imported model comes from, in words."""

from dataclasses import dataclass

from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from, for its card.

    Attributes:
        source: The package or folder.
        licence: What is known of the weights' licence.
        src_lang: Language code of the source.
        tgt_lang: Language code of the target.
    """

    source: str
    licence: str = "unknown; ask whoever published the weights"
    src_lang: str | None = None
    tgt_lang: str | None = None


def model_card(checksums: dict[str, str], provenance: Provenance, shortlist: bool) -> str:
    """The model card.

    Args:
        checksums: SHA-256 of the files that were imported, by name.
        provenance: Where they come from.
        shortlist: Whether there is a shortlist among them.
    """
    languages = [code for code in (provenance.src_lang, provenance.tgt_lang) if code]
    head = "---\nlibrary_name: transformers\npipeline_tag: translation\n"
    head += "".join(["language:\n", *(f"- {code}\n" for code in languages)]) if languages else ""
    direction = " → ".join(languages) or "translation"
    files = "\n".join(f"- `{name}`, SHA-256 `{checksum}`" for name, checksum in checksums.items())
    return (
        f"{head}---\n\n"
        f"# {direction}, a student of the Firefox Translations / Bergamot family\n\n"
        "Transformer encoder, SSRU decoder; 8-bit weights of Marian written as float32. Made by `import_model.py` of "
        "lightning-knnmt, whose package must be imported before `AutoModelForSeq2SeqLM` loads this folder. Translate "
        "one sentence at a time.\n\n"
        f"**Source:** {provenance.source}\n\n{files}\n\n"
        f"**Licence of the weights:** {provenance.licence}.\n"
        + (f"\n`{SHORTLIST_FILE}` is the lexical shortlist of the original.\n" if shortlist else "")
    )
