"""``train_step.py`` and ``generate.py`` in PyTorch: transformers' GPT-J with adapters, and a CLIP ResNet."""

from collections.abc import Callable
from typing import Any

import generate
import torch
import train_step as sizes
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GPTJConfig, GPTJModel


class Adapted(nn.Module):
    """An MLP followed by a bottleneck adapter."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        bottleneck = sizes.WIDTH // 4
        self.mlp, self.down, self.up = mlp, nn.Linear(sizes.WIDTH, bottleneck), nn.Linear(bottleneck, sizes.WIDTH)
        for parameter in (*self.down.parameters(), *self.up.parameters()):
            nn.init.normal_(parameter, std=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x)
        return y + self.up(functional.relu(self.down(y)))


class Bottleneck(nn.Module):
    """CLIP's bottleneck: the stride is an average pool."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.BatchNorm2d(4 * channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != 4 * channels:
            conv = nn.Conv2d(inputs, 4 * channels, 1, bias=False)
            self.shortcut = nn.Sequential(self.pool, conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(self.pool(y))) + self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """CLIP's RN50 without its attention pool: (B, 3, 224, 224) to (B, 2048, 7, 7)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.append(nn.AvgPool2d(2))
    inputs = width
    for stage, count in enumerate(blocks):
        channels = width * 2**stage
        for block in range(count):
            layers.append(Bottleneck(inputs, channels, 2 if stage and not block else 1))
            inputs = 4 * channels
    return nn.Sequential(*layers)


class Magma(nn.Module):
    """Encoder, prefix and language model; only encoder, prefix and adapters learn."""

    def __init__(self, remat: bool):
        super().__init__()
        config = GPTJConfig(
            vocab_size=sizes.VOCAB_ROWS,
            n_embd=sizes.WIDTH,
            n_layer=sizes.LAYERS,
            n_head=sizes.HEADS,
            n_inner=sizes.FEED_FORWARD,
            rotary_dim=sizes.WIDTH // sizes.HEADS,
            attn_implementation="eager",  # pyright: ignore[reportCallIssue]  # accepted by every config, but not in the signature
        )
        # The whole model, not its blocks: what a block is called with changes between transformers' minor releases.
        self.lm, self.head = GPTJModel(config), nn.Linear(sizes.WIDTH, sizes.HEAD_ROWS)
        self.requires_grad_(False)
        if remat:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.lm.h:
            layer.mlp = Adapted(layer.get_submodule("mlp"))
        self.encoder, self.proj, self.ln = resnet(), nn.Linear(2048, sizes.WIDTH), nn.LayerNorm(sizes.WIDTH)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        grid = self.encoder(images).flatten(2).transpose(1, 2)
        return self.ln(functional.dropout(self.proj(grid), 0.1, self.training))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        prefix = self.embed_images(images)
        x = torch.cat([prefix, self.lm.wte(tokens[:, :-1])], dim=1)
        logits = self.head(self.lm(inputs_embeds=x, use_cache=False).last_hidden_state)
        # The original computes the logits of all positions and excludes those of the image from the loss.
        predicting = logits[:, prefix.shape[1] - 1 :]
        return functional.cross_entropy(predicting.flatten(0, 1), tokens.flatten())

    def next_tokens(self, x: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Most likely token after embeddings (B, S, D), which continue the cache."""
        hidden = self.lm(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return self.head(hidden[:, -1]).argmax(-1)


def make_generate(batch: int, threads: int) -> Callable[[int], Any]:
    """Returns a function that generates a number of tokens after an image and a prompt, greedily."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Magma(remat=False).eval()
    images = torch.randn(batch, 3, sizes.IMAGE_SIZE, sizes.IMAGE_SIZE)
    prompt = torch.randint(sizes.VOCAB_ROWS, (batch, generate.PROMPT))

    @torch.inference_mode()
    def draw(count: int) -> Any:
        cache = DynamicCache()
        token = model.next_tokens(torch.cat([model.embed_images(images), model.lm.wte(prompt)], dim=1), cache)
        tokens = [token]
        for _ in range(count - 1):
            token = model.next_tokens(model.lm.wte(token.clamp(max=sizes.VOCAB_ROWS - 1))[:, None], cache)
            tokens.append(token)
        return torch.stack(tokens, 1).numpy()

    return draw


def make_step(remat: str, batch_norm: str, threads: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Returns the step, which returns its loss, and values to report before the first one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Magma(remat != "none")
    model.encoder.train(batch_norm == "batch")
    encoder = list(model.encoder.parameters())
    inside = {id(parameter) for parameter in encoder}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": encoder, "lr": sizes.ENCODER_RATE}, {"params": rest, "lr": sizes.RATE}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    images = torch.randn(sizes.BATCH, 3, sizes.IMAGE_SIZE, sizes.IMAGE_SIZE)
    tokens = torch.randint(sizes.VOCAB_ROWS, (sizes.BATCH, sizes.POSITIONS - sizes.IMAGE_POSITIONS + 1))

    def step() -> float:
        loss = model(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*encoder, *rest], sizes.CLIP_NORM)
        optimizer.step()
        return loss.item()

    return step, {}
