"""Losses as pure functions of tensors: no parameters, no state, no configuration.

Every rank computes the same global loss from gathered features. Shapes: N = global batch, B = a rank's share, M = keys,
the batch's own N first, D = width; a name like ``target_NM`` has a row for each query and a column for each key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import distributed


class Affinity(NamedTuple):
    """What one teacher says about which keys resemble which queries."""

    query_ND: torch.Tensor
    key_MD: torch.Tensor
    mask_N: torch.Tensor
    """Rows for which the teacher may speak; it is asked about these queries and these keys only."""
    scale: float
    """Factor on its cosines before softmax."""
    key_mask_M: torch.Tensor | None = None
    """The same for the keys, where they are more than the batch."""


def clip_loss(image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy: each picture finds its caption among N, each caption its picture."""
    logits_NN = scale * image_ND @ text_ND.T
    labels_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, labels_N) + F.cross_entropy(logits_NN.T, labels_N)) / 2


def siglip_loss(image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Each of the N x N pairings is judged by itself, true or not; summed, over N (Zhai et al. 2023, algorithm 1)."""
    logits_NN = scale * image_ND @ text_ND.T + bias
    sign_NN = 2 * torch.eye(len(logits_NN), device=logits_NN.device) - 1
    return -F.logsigmoid(sign_NN * logits_NN).sum() / len(logits_NN)


def feature_regression(student_ND: torch.Tensor, target_ND: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Squared error, averaged over the rows that count and over the dimensions; 0 without such rows.

    One side of MMKD-CLIP's ``fd_loss`` (``open_clip/loss.py``, KDClipLoss), which adds the picture's and the caption's.
    """
    row_N = (student_ND - target_ND).square().mean(dim=1)
    return (row_N * rows_N).sum() / rows_N.sum().clamp(min=1)


def cross_contrastive(
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    teacher_image_ND: torch.Tensor,
    teacher_text_ND: torch.Tensor,
    rows_N: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The student's pictures find the teacher's captions and its captions the teacher's pictures; 0 without rows.

    MMKD-CLIP's ``icl_loss`` (``open_clip/loss.py``, KDClipLoss), from CLIP-KD's interactive contrastive learning.
    """
    if not rows_N.any():
        return image_ND.new_zeros(())
    labels = torch.arange(int(rows_N.sum()), device=image_ND.device)
    to_text = scale * image_ND[rows_N] @ teacher_text_ND[rows_N].T
    to_image = scale * text_ND[rows_N] @ teacher_image_ND[rows_N].T
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def head_errors(predicted_NT: torch.Tensor, target_NT: torch.Tensor, smooth_share: float) -> torch.Tensor:
    """How far a head's prediction is from a teacher's vector, for each row [N].

    Args:
        predicted_NT: What the head made of the student's vectors; of any length.
        target_NT: The teacher's unit vectors.
        smooth_share: Weight of the smooth L1 distance; the rest is on one minus the cosine. Theia and UNIC give it 0.1
            to 0.5.
    """
    cosine_N = F.cosine_similarity(predicted_NT, target_NT, dim=1)
    # Over the dimensions it is summed: a unit vector's entries are of the order of 1 / sqrt(T), whatever T.
    smooth_N = F.smooth_l1_loss(predicted_NT, target_NT, reduction="none").sum(dim=1)
    return (1 - smooth_share) * (1 - cosine_N) + smooth_share * smooth_N


def mean_over_teachers(
    errors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], draws_KN: torch.Tensor | None, drop: float
) -> torch.Tensor:
    """Average errors over the teachers that may speak for a row, then over the rows for which any may; 0 without.

    Args:
        errors: For each teacher, [N].
        masks: For each teacher, where it may speak [N].
        draws_KN: For each teacher and row, a number in [0, 1); None drops nothing.
        drop: Chance that a teacher is left out for a row. The one with the greatest error always stays, so that none
            is forgotten (UNIC, section 3.3).
    """
    error_KN, mask_KN = torch.stack(tuple(errors)), torch.stack(tuple(masks))
    kept_KN = mask_KN
    if drop and draws_KN is not None:
        worst_N = error_KN.detach().masked_fill(~mask_KN, -1).argmax(dim=0)
        is_worst_KN = F.one_hot(worst_N, len(error_KN)).T.bool()
        kept_KN = mask_KN & ((draws_KN >= drop) | is_worst_KN)
    row_N = torch.where(kept_KN, error_KN, torch.zeros_like(error_KN)).sum(dim=0) / kept_KN.sum(dim=0).clamp(min=1)
    rows_N = mask_KN.any(dim=0)
    return (row_N * rows_N).sum() / rows_N.sum().clamp(min=1)


def mean_affinity(teachers: Sequence[Affinity], exclude_self: bool | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the teachers' softmaxed similarities, after softmax, over the teachers admissible for each row.

    Args:
        teachers: At least one; each row's softmax runs over the columns its teacher is admissible for.
        exclude_self: Leave the diagonal out, for similarities within one modality; or bool [N, M], the columns that are
            each row's own sample.

    Returns:
        target_NM, whose valid rows sum to 1, and rows_N (bool), the rows for which any teacher spoke.
    """
    rows, keys = len(teachers[0].mask_N), len(teachers[0].key_MD)
    total_NM = teachers[0].query_ND.new_zeros(rows, keys)
    speaking_N = total_NM.new_zeros(rows)
    itself_NM = _itself(exclude_self, total_NM)
    for teacher in teachers:
        key_mask_M = teacher.mask_N if teacher.key_mask_M is None else teacher.key_mask_M
        allowed_NM = teacher.mask_N[:, None] & key_mask_M[None, :]
        if itself_NM is not None:
            allowed_NM = allowed_NM & ~itself_NM
        logits_NM = teacher.scale * teacher.query_ND @ teacher.key_MD.T
        # A finite floor, since a row without any allowed column would turn to NaN under -inf.
        floor = torch.finfo(logits_NM.dtype).min
        share_NM = logits_NM.masked_fill(~allowed_NM, floor).softmax(dim=1) * allowed_NM
        total_NM = total_NM + share_NM
        speaking_N = speaking_N + allowed_NM.any(dim=1)
    return total_NM / speaking_N.clamp(min=1)[:, None], speaking_N > 0


def similarity_distillation(
    query_ND: torch.Tensor,
    key_MD: torch.Tensor,
    scale: torch.Tensor,
    target_NM: torch.Tensor,
    rows_N: torch.Tensor,
    exclude_self: bool | torch.Tensor,
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teachers' rows to the student's softmax; 0 is perfect agreement.

    Args:
        query_ND: The student's unit vectors that ask.
        key_MD: The student's unit vectors that are compared with.
        scale: Factor on the student's cosines.
        target_NM: From :func:`mean_affinity`.
        rows_N: Rows that count; the mean is over them, and 0 if there are none.
        exclude_self: As it was for the target.
    """
    logits_NM = scale * query_ND @ key_MD.T
    itself_NM = _itself(exclude_self, logits_NM)
    if itself_NM is not None:
        logits_NM = logits_NM.masked_fill(itself_NM, torch.finfo(logits_NM.dtype).min)
    log_student_NM = logits_NM.log_softmax(dim=1)
    # xlogy(0, 0) = 0; a column the target excludes must not multiply the floor's huge logarithm.
    cross_NM = torch.where(target_NM > 0, target_NM * log_student_NM, torch.zeros_like(log_student_NM))
    row_N = torch.xlogy(target_NM, target_NM).sum(dim=1) - cross_NM.sum(dim=1)
    return (row_N * rows_N).sum() / rows_N.sum().clamp(min=1)


def _itself(exclude_self: bool | torch.Tensor, like_NM: torch.Tensor) -> torch.Tensor | None:
    if isinstance(exclude_self, torch.Tensor):
        return exclude_self
    return torch.eye(*like_NM.shape, dtype=torch.bool, device=like_NM.device) if exclude_self else None


def graph_matching(
    features_ND: torch.Tensor, teacher_NT: torch.Tensor, rows_N: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Each row finds itself between two graphs by its edges alone, both ways; 0 with fewer than three rows.

    The rows that count are the vertices of two graphs, one of the student's cosines and one of the teacher's. A vertex
    is described by its edges to all the others, less their mean; two vertices match by the cosine of these.

    The idea is LVM-Med's (Nguyen et al. 2023, section 3.2): a matching is judged by the edges that it preserves. They
    search for the best assignment by a combinatorial solver; here its softmax relaxation is held against the known one.
    """
    if int(rows_N.sum()) < 3:
        return features_ND.new_zeros(())
    logits_NN = scale * _edges(features_ND[rows_N]) @ _edges(teacher_NT[rows_N]).T
    labels_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, labels_N) + F.cross_entropy(logits_NN.T, labels_N)) / 2


def _edges(vectors_ND: torch.Tensor) -> torch.Tensor:
    """For each row its cosines with the others less their mean, and 0 for itself: [N, N], each row of length one."""
    off_NN = 1 - torch.eye(len(vectors_ND), dtype=vectors_ND.dtype, device=vectors_ND.device)
    cosine_NN = vectors_ND @ vectors_ND.T
    mean_N1 = (cosine_NN * off_NN).sum(dim=1, keepdim=True) / (len(vectors_ND) - 1)
    return F.normalize((cosine_NN - mean_N1) * off_NN, dim=1)


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order; see :func:`gather_features` for the gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_BD: torch.Tensor) -> torch.Tensor:
        return gather_constant(local_BD)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_ND: torch.Tensor) -> torch.Tensor:
        world, rank = distributed.get_world_size(), distributed.get_rank()
        return grad_ND.chunk(world)[rank] * world


def gather_features(local_BD: torch.Tensor) -> torch.Tensor:
    """Put all ranks' rows below each other, in rank order, with gradient; the identity without process groups.

    Contract: every rank then computes the *same* loss from the result. So a rank's own slice of the gradient is already
    complete and nothing needs to be exchanged; it is multiplied by the number of ranks, because
    DistributedDataParallel averages the parameters' gradients over ranks where their sum is the gradient.
    """
    if not _distributed():
        return local_BD
    return _Gather.apply(local_BD)


def gather_constant(local: torch.Tensor) -> torch.Tensor:
    """Put all ranks' rows below each other, in rank order, without gradient."""
    if not _distributed():
        return local
    parts = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
