"""Networks of the timm library by name, for configurations."""

from __future__ import annotations

from torch import nn

from lightning_prune.errors import OptionError

__all__ = ["timm_model"]


def timm_model(
    name: str, *, pretrained: bool = False, num_classes: int = 1000, drop_path_rate: float = 0.0
) -> nn.Module:
    """Build a network of timm; nothing of it is changed.

    Args:
        name: As in ``timm.list_models()``, such as ``deit_base_distilled_patch16_224``.
        pretrained: Load trained weights, which timm fetches.
        num_classes: Outputs, >= 1.
        drop_path_rate: Share of the residual branches that a training step leaves out, in [0, 1).

    Raises:
        OptionError: If timm is not installed, or knows no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise OptionError(
            f"the network {name!r} comes from timm, which cannot be imported ({error}); install it with "
            "pip install 'lightning-prune[timm]', or choose another model="
        ) from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5])
        raise OptionError(f"timm knows no network {name!r}; it knows {near} ...")
    model: nn.Module = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, drop_path_rate=drop_path_rate
    )
    return model
