"""torchvision: one size of every family: classification, segmentation, detection, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo.cases import ZooCase, draw
from zoo.operators import import_torchvision

# model: size of the square images
_IMAGES = {
    "alexnet": 128,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_32": 64,
    "deeplabv3_mobilenet_v3_large": 64,
    "deeplabv3_resnet50": 64,
    "deeplabv3_resnet101": 64,
    "fcn_resnet50": 64,
    "fcn_resnet101": 64,
    "lraspp_mobilenet_v3_large": 64,
}
# one image is enough where it is large and no batch norm is left with one value
LARGE = ("maxvit_t",)
# model: frames, size
_VIDEOS = {
    "r3d_18": (4, 32),
    "mc3_18": (4, 32),
    "r2plus1d_18": (4, 32),
    "s3d": (16, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (4, 64),
    "swin3d_s": (4, 64),
    "swin3d_b": (4, 64),
}
_DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
_FLOWS = ("raft_small", "raft_large")


def _build(name: str, **options: Any) -> nn.Module:
    import_torchvision()
    model: nn.Module = import_module("torchvision.models").get_model(name, weights=None, **options)
    return model


def _classifier(name: str) -> nn.Module:
    extra: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        extra["image_size"] = _IMAGES[name]
    if name in _DETECTORS or "deeplab" in name or "fcn" in name or "lraspp" in name:
        extra["weights_backbone"] = None
    return _build(name, **extra)


def _detector(name: str) -> nn.Module:
    """Few candidates and no threshold: random weights would find nothing, and nothing equals nothing."""
    if name.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn")):
        few = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 12, "box_detections_per_img": 10}
        few |= {"rpn_pre_nms_top_n_train": 40, "rpn_post_nms_top_n_train": 12, "box_batch_size_per_image": 16}
        few |= {"box_score_thresh": 0.0, "min_size": 96, "max_size": 128}
    else:
        few = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 10}
        few |= {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    return _build(name, weights_backbone=None, **few)


def _picture() -> tuple[list[Tensor]]:
    return ([draw(3, 96, 128).sigmoid()],)


def _pictures_and_targets(name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    target = {"boxes": torch.tensor([[10.0, 12.0, 70.0, 80.0]]), "labels": torch.tensor([1])}
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(1, 96, 128, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["keypoints"] = torch.tensor([[[30.0, 40.0, 1.0]] * 17])
    pictures = [draw(3, 96, 128, seed=s).sigmoid() for s in range(2)]
    return pictures, [{k: v.clone() for k, v in target.items()} for _ in pictures]


def _pair() -> tuple[Tensor, Tensor]:
    return draw(1, 3, 128, 128), draw(1, 3, 128, 128, seed=1)


def _case(name: str, build: Callable[[str], nn.Module], inputs: Callable[[], Any], **more: Any) -> ZooCase:
    return ZooCase(f"torchvision/{name}", partial(build, name), inputs, **more)


TORCHVISION = [
    *(
        _case(name, _classifier, partial(draw, 1 if name in LARGE else 2, 3, size, size))
        for name, size in _IMAGES.items()
    ),
    *(
        _case(name, _classifier, partial(draw, 1 if size > 64 else 2, 3, n, size, size))
        for name, (n, size) in _VIDEOS.items()
    ),
    *(
        _case(name, _detector, _picture, train_inputs=partial(_pictures_and_targets, name), counts=True)
        for name in _DETECTORS
    ),
    *(_case(name, _build, _pair) for name in _FLOWS),
]
