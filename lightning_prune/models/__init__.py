"""Small networks for the demo, and the LightningModule that trains them."""

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.resnet import ResNet
from lightning_prune.models.timm_models import timm_model
from lightning_prune.models.vit import ViT

__all__ = ["Classifier", "ResNet", "ViT", "timm_model"]
