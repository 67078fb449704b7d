"""The loss of a language model: of a causal one computed only where a token carries it, of an encoder-decoder over its targets.

Shapes: B samples, S positions, K kept positions, T positions of a target, R = B·T, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from launcher.train.encode import IGNORED
from launcher.train.head import LossHead


def sum_token_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the tokens of `labels_BS` that are not IGNORED, in fp32.

    Logits are made only for columns in which some row predicts a token that counts: with loss on answers
    alone, the head (a fifth of SmolLM2's arithmetic, most of the memory of a small model) runs on them only.
    """
    if "decoder_input_ids" in batch:
        return sum_pair_loss(model, batch)
    targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    kept_K = (targets_BS != IGNORED).any(dim=0).nonzero().squeeze(1)
    if kept_K.numel() == 0:  # a filler batch: still one forward, so that every rank takes part in collectives
        kept_K = torch.zeros(1, dtype=torch.long, device=targets_BS.device)
    return sum_kept_loss(model, batch, targets_BS, kept_K)


def sum_kept_loss(model: Any, batch: dict[str, torch.Tensor], targets_BS: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """The loss of the columns `kept_K`. By itself, because a trace on the meta device cannot find them (train/trace.py)."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.targets_R = targets_BS[:, kept_K].flatten()
        try:
            loss: torch.Tensor = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=kept_K
            ).logits
        finally:
            head.targets_R = None
        return loss
    logits_BKV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=kept_K).logits
    return F.cross_entropy(logits_BKV.float().flatten(0, 1), targets_BS[:, kept_K].flatten(), ignore_index=IGNORED, reduction="sum")


def sum_pair_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """An encoder-decoder's cross-entropy, summed over the tokens of `labels_BT` that are not IGNORED, in fp32.

    `decoder_input_ids` are the labels one place later, so that nothing is shifted here. A target ends its row: every column is needed.
    """
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels_R = batch["labels"].flatten()
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.targets_R = labels_R
        try:
            loss: torch.Tensor = model(**given, use_cache=False).logits
        finally:
            head.targets_R = None
        return loss
    logits_BTV = model(**given, use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_R, ignore_index=IGNORED, reduction="sum")
