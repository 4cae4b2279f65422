"""The same models and step, hand-written in PyTorch: eager, with fused AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from workloads import MILLIONS_124, SMALL, TINY, USERS_AND_ITEMS, GptSize, in_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):  # type: ignore[misc]
    def __init__(self, size: GptSize = SMALL) -> None:
        super().__init__()
        width = size.width
        self.tokens = nn.Embedding(size.vocabulary, width)
        self.positions = nn.Embedding(size.length, width)
        self.blocks = nn.Sequential(*[Block(width, size.heads) for _ in range(size.depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight
        return self.head(self.norm(self.blocks(x)))


class ChannelsFirst(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class Flip(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def _convnet() -> nn.Module:
    parts: list[nn.Module] = [ChannelsFirst(), Flip()]
    for before, after in ((3, 32), (32, 64), (64, 128)):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        parts += [nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Bottleneck(nn.Module):  # type: ignore[misc]
    """A block of ResNet-50 as Keras builds it: the stride in the first convolution, biases."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *[nn.Conv2d(before, width, 1, stride), nn.BatchNorm2d(width), nn.ReLU()],
            *[nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()],
            *[nn.Conv2d(width, after, 1), nn.BatchNorm2d(after)],
        )
        same = stride == 1 and before == after
        parts = [nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _resnet50() -> nn.Module:
    parts: list[nn.Module] = [ChannelsFirst(), nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64)]
    parts += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            parts.append(Bottleneck(before, width, stride if i == 0 else 1))
            before = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _recommender() -> nn.Module:
    head = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)]
    return nn.Sequential(nn.Embedding(USERS_AND_ITEMS, 32), nn.Flatten(), *head)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)),
    "gpt": Gpt,
    "gpt-tiny": lambda: Gpt(TINY),
    "gpt124m": lambda: Gpt(MILLIONS_124),
    "convnet": _convnet,
    "resnet50": _resnet50,
    "recommender": _recommender,
}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long())


def loops(
    workload: str, make: Any, loss: Any, compiled: bool = False
) -> dict[str, Callable[[Any, Any], Any]]:
    """The loop, eager or with model and loss under ``torch.compile``."""
    layout = torch.channels_last if DEVICE == "cuda" else torch.preserve_format
    model = MODELS[workload]().to(DEVICE, memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    bf16 = in_bf16()

    def objective(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            return cross_entropy(model(x), y)

    forward = torch.compile(objective) if compiled else objective

    def run(x: Any, y: Any) -> Any:
        value = forward(_on_device(x), _on_device(y))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return {"torch.compile" if compiled else "torch loop": run}


def _on_device(x: Any) -> torch.Tensor:
    tensor = torch.from_numpy(x)
    return tensor if DEVICE == "cpu" else tensor.pin_memory().to(DEVICE, non_blocking=True)


def wait(value: Any) -> None:
    value.item()
