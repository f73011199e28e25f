"""The encoder being trained: one step after another, in plain PyTorch."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from vop.models.backbone import Backbone
from vop.models.encoder import Encoder
from vop.schema import TrainConfig
from vop.training.batches import Batch
from vop.training.loss import overlap_loss

LOSSES = ("loss", "positive_loss", "negative_loss")


class LossError(RuntimeError):
    """A loss that is not a number, or has gradients that are none."""


class Learner:
    """An encoder, its optimizer, and the number of steps done.

    Args:
        encoder: the one to train, in place.
        config: learning rate and its decay, precision, seed.
        device: where to compute.
        wrap: makes the encoder a model whose gradients are averaged over workers; None: one worker.
        rank: of this worker: workers drop out other numbers.
        backbone: computes tokens where a batch holds pixels; None: batches hold tokens.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        rank: int = 0,
        backbone: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.encoder, self.config, self.device = encoder.to(device).requires_grad_(True), config, torch.device(device)
        self.rank, self.backbone, self.step_number = rank, backbone, 0
        self.model = self.encoder if wrap is None else wrap(self.encoder)
        self.optimizer = torch.optim.AdamW(
            self.encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        half = config.precision == "bfloat16" or (config.precision is None and self.device.type == "cuda")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def step(self, batch: Batch, epoch: int) -> dict[str, float]:
        """Learn from this worker's share of a batch; returns its losses.

        The share is computed in `accumulate` parts. What is dropped out follows from the seed, the number of the step
        and the rank. Raises `LossError` for a loss or gradients that are not finite, on every worker although the
        share of one of them is to blame; nothing is learned from such a batch.
        """
        torch.manual_seed(_mixed(self.config.seed, self.step_number, self.rank))
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(LOSSES), device=self.device)
        parts = batch.parts(self.config.accumulate)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            apart = nullcontext() if last or self.model is self.encoder else self.model.no_sync()
            with apart:
                found = self.losses(part)
                share = len(part) / len(batch)
                (found["loss"] * share).backward()
            losses += share * torch.stack([found[name].detach() for name in LOSSES])
        # The gradients of a loss that is not finite are not finite either, and averaged they are the same everywhere:
        # only they let all workers stop at the same step.
        if not torch.stack([parameter.grad.isfinite().all() for parameter in self.encoder.parameters()]).all():
            raise LossError(f"step {self.step_number} has gradients that are not finite, and the loss {losses[0]:g}")
        self.optimizer.step()
        self.step_number += 1
        return dict(zip(LOSSES, losses.tolist(), strict=True))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a batch, scalars, with the encoder as it is."""
        batch = batch.to(self.device)
        sizes = torch.cat([batch.sizes0, batch.sizes1])
        inputs = torch.cat([batch.inputs0, batch.inputs1])
        tokens = self.backbone(inputs, sizes) if inputs.dtype == torch.uint8 else inputs.float()
        with self.autocast:
            desc0, desc1 = self.model(tokens, sizes).chunk(2)
        return overlap_loss(desc0, desc1, batch.positive, batch.negative)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and what the optimizer remembers of them, by name; with `step_number` all there is."""
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        for name, parameter in self.encoder.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def load(self, tensors: dict[str, torch.Tensor], step_number: int) -> None:
        """Go on from a state."""
        prefix = "encoder."
        weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        self.encoder.load_state_dict(weights)
        self.step_number = step_number
        for name, parameter in self.encoder.named_parameters():
            prefix = f"optimizer.{name}."
            known = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if known:  # the count of steps stays on the CPU, as AdamW has it
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(self.device, copy=True)
                    for key, value in known.items()
                }


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, from 0: constant, then smaller by `decay` each epoch from `decay_from` on."""
    return config.learning_rate * config.decay ** max(0, epoch - config.decay_from + 1)


def token_maker(backbone: Backbone, imagenet: Sequence[torch.Tensor] | None = None) -> Callable:
    """A function from letterboxed pixels (B, S, S, 3) uint8 and sizes (B, 2) to tokens (B, P, D)."""

    def tokens(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if imagenet is not None:
            images = (images - imagenet[0].to(images.device)) / imagenet[1].to(images.device)
        return backbone(images, sizes)[0].clone()  # made under inference_mode, which autograd refuses

    return tokens


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1
