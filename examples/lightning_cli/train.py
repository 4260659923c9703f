"""Pruning in a LightningCLI: the callback is a few lines of YAML, no code.

pip install 'lightning-prune[demo]' 'jsonargparse[signatures]'
python examples/lightning_cli/train.py fit --config examples/lightning_cli/config.yaml
python examples/lightning_cli/train.py fit --config examples/lightning_cli/config.yaml --trainer.max_epochs 4
python examples/lightning_cli/train.py fit --trainer.callbacks.help StructuredPruning
"""

from lightning.pytorch.cli import LightningCLI

from lightning_prune import StructuredPruning  # noqa: F401 - so that its short name is known on the command line
from lightning_prune.data import Digits
from lightning_prune.models import Classifier

if __name__ == "__main__":
    LightningCLI(Classifier, Digits, save_config_callback=None, seed_everything_default=0)
