"""A Hydra program of your own that takes the shipped configuration of pruning.

    pip install 'lightning-prune[demo]'
    python examples/hydra_app/app.py                               some seconds
    python examples/hydra_app/app.py pruning=isomorphic epochs=8
    python examples/hydra_app/app.py --cfg job                     what there is to change

conf/config.yaml says where the shipped files are found: ``searchpath: [pkg://lightning_prune.conf]``.
"""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

import lightning_prune.commands  # noqa: F401 - teaches OmegaConf ${share:...}: schedules follow the epochs


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Build everything from the configuration and train."""
    trainer = instantiate(cfg.trainer, callbacks=[instantiate(cfg.pruning)], logger=False)
    trainer.fit(instantiate(cfg.model), datamodule=instantiate(cfg.data))


if __name__ == "__main__":
    main()
