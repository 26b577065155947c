"""Train a plain torchvision ResNet-18 on an exported set and measure it on real images: train_resnet.py DEST DATA [EPOCHS]."""

import sys
from glob import glob

import torch
import webdataset
from torchvision.models import resnet18


def load(pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of some shards, float [N, 3, H, W] in [0, 1], and their classes."""
    shards = sorted(glob(pattern)) or sys.exit(f"no shards at {pattern}")
    rows = webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb")
    images, labels = zip(*rows.to_tuple("png;jpg;webp", "cls"), strict=True)
    return torch.stack(images), torch.tensor(labels)


dest, data, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 30
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = (t.to(device) for t in load(f"{dest}/train/*.tar"))
net = resnet18(num_classes=int(labels.max()) + 1).to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
for _ in range(epochs):
    for batch in torch.randperm(len(images), device=device).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
net.eval()
with torch.no_grad():
    found = [
        (net(x.to(device)).argmax(1).cpu() == y)
        for x, y in zip(*(t.split(250) for t in load(f"{data}/test/*.tar")), strict=True)
    ]
print(f"accuracy on real test images: {100 * torch.cat(found).float().mean():.1f} %")
