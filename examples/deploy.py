"""Deploy a pruned network: as an ONNX file, checked against PyTorch and timed in ONNX Runtime.

pip install 'lightning-prune[demo,export]'
python examples/deploy.py                 some seconds
"""

import copy
import os
import time
from pathlib import Path

import onnxruntime
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_prune import StructuredPruning, load_from_checkpoint
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

seed_everything(0)
epochs = int(os.environ.get("EPOCHS", "8"))
model = Classifier(ResNet())
dense = copy.deepcopy(model.net)
pruning = StructuredPruning(0.5, module="net", start_epoch=epochs // 2, options={"round_to": 8})
trainer = Trainer(max_epochs=epochs, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(model, datamodule=Digits())
trainer.save_checkpoint("pruned.ckpt", weights_only=True)

# On the machine that serves: the class, the file, no example inputs, nothing unpickled.
pruned = load_from_checkpoint(Classifier, "pruned.ckpt", net=ResNet()).net
images = torch.randn(64, 1, 8, 8)


def session(net: torch.nn.Module, path: str) -> onnxruntime.InferenceSession:
    """Export to ONNX with a batch of any size, and open it."""
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        net.eval(),
        (images[:2],),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        verbose=False,
    )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def milliseconds(run: onnxruntime.InferenceSession) -> float:
    """Give the least of some runs on 64 images."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run.run(None, {"images": images.numpy()})
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


sessions = {"dense": session(dense, "dense.onnx"), "pruned": session(pruned, "pruned.onnx")}
(served,) = sessions["pruned"].run(None, {"images": images.numpy()})
with torch.no_grad():
    difference = (torch.from_numpy(served) - pruned(images)).abs().max()
print(f"PyTorch and ONNX Runtime differ by {difference:.1e} at most")
for name, run in sessions.items():
    size = sum(file.stat().st_size for file in Path().glob(f"{name}.onnx*"))  # large weights lie beside
    print(f"{name:>6}.onnx  {size / 1024:7.0f} KiB  {milliseconds(run):7.3f} ms for 64 images")
