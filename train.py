"""Train or fine-tune a translation model: ``python train.py fit --config configs/base.yaml``."""

from lightning.pytorch.cli import LightningCLI

from lightning_knnmt.training import TranslationModule
from lightning_knnmt.training.datamodule import TranslationDataModule


def main(args: list[str] | None = None) -> None:
    """Run Lightning's command line: fit, validate, test or predict."""
    LightningCLI(TranslationModule, TranslationDataModule, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
