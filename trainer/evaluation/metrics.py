"""Scores of classification and retrieval with 95 % bootstrap intervals, in numpy alone.

Every classification score is a function of sample weights: all ones give the value, and a resample is a row of
multiplicities, so a thousand resamples are one matrix product. N = samples, C = classes, B = resamples,
Q = queries, M = candidates, P = matching (query, candidate) pairs, D = width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CELLS_AT_ONCE = 8_000_000  # of a [B, N] or [Q, M] matrix: 64 MB of float64


@dataclass(frozen=True)
class Score:
    """A value, the same value in each bootstrap resample (float64 [B]), and how many samples are behind it."""

    value: float
    resampled_B: np.ndarray
    n: int

    def interval(self) -> tuple[float, float]:
        """Bounds of the central 95 % of the resamples."""
        low, high = np.percentile(self.resampled_B, [2.5, 97.5])
        return float(low), float(high)


def mean_score(scores: list[Score]) -> Score:
    """The unweighted mean of independent scores; resample b of the mean averages resample b of each."""
    values = [score.value for score in scores]
    resampled_B = np.mean([score.resampled_B for score in scores], axis=0)
    return Score(float(np.mean(values)), resampled_B, sum(score.n for score in scores))


def accuracy(probabilities_NC: np.ndarray, classes_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Share of samples whose highest probability is their class's. Returns float64 [B]."""
    correct_N = (probabilities_NC.argmax(1) == classes_N).astype(np.float64)
    return (weights_BN @ correct_N) / weights_BN.sum(1)


def macro_f1(probabilities_NC: np.ndarray, classes_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """F1 averaged over the classes that occur in ``classes_N``; a class never predicted counts 0. Returns [B]."""
    predicted_N = probabilities_NC.argmax(1)
    per_class = []
    for label in np.unique(classes_N):
        is_label, is_predicted = classes_N == label, predicted_N == label
        hits_B = weights_BN @ (is_label & is_predicted).astype(np.float64)
        # F1 = 2 TP / (TP + FN + TP + FP)
        per_class.append(2 * hits_B / (weights_BN @ (is_label.astype(np.float64) + is_predicted)))
    return np.mean(per_class, axis=0)


def macro_auc(probabilities_NC: np.ndarray, classes_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Area under the one-vs-rest ROC curve, averaged over the classes that occur. Returns float64 [B].

    The area is the chance that a sample of the class outranks one of the rest, ties counting one half.

    Raises:
        ValueError: Fewer than two classes occur, so nothing can be ranked against anything.
    """
    present = np.unique(classes_N)
    if len(present) < 2:
        raise ValueError("AUC needs samples of at least two classes")
    areas = [_auc(probabilities_NC[:, label], classes_N == label, weights_BN) for label in present]
    return np.mean(areas, axis=0)


def multilabel_auc(scores_NC: np.ndarray, truth_NC: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class's own scores, averaged over classes that some samples have and some lack.

    What scikit-learn's ``roc_auc_score(truth, scores, average="macro")`` gives for multi-hot truth, but that a class
    of which nothing can be ranked is left out; a resample in which that is every class counts one half, like guessing.

    Args:
        scores_NC: Only the order within a column matters.
        truth_NC: Bool, any number of classes for a sample.
        weights_BN: Multiplicities.

    Returns:
        float64 [B].

    Raises:
        ValueError: No class can be ranked.
    """
    columns = [column for column in range(truth_NC.shape[1]) if 0 < truth_NC[:, column].sum() < len(truth_NC)]
    if not columns:
        raise ValueError("AUC needs a class that some samples have and some lack")
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample holds only positives, or only negatives, of a class
        areas_CB = np.stack([_auc(scores_NC[:, c], truth_NC[:, c], weights_BN) for c in columns])
    known_CB = np.isfinite(areas_CB)
    count_B = known_CB.sum(0)
    mean_B: np.ndarray = np.where(known_CB, areas_CB, 0).sum(0) / np.maximum(count_B, 1)
    return np.where(count_B > 0, mean_B, 0.5)


def _auc(scores_N: np.ndarray, positive_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    order_N = np.argsort(scores_N, kind="stable")
    starts = np.flatnonzero(np.diff(scores_N[order_N], prepend=np.nan) != 0)  # where each group of ties begins
    positive_BN = weights_BN[:, order_N] * positive_N[order_N]
    negative_BN = weights_BN[:, order_N] - positive_BN
    positive_BG = np.add.reduceat(positive_BN, starts, axis=1)
    negative_BG = np.add.reduceat(negative_BN, starts, axis=1)
    below_BG = np.cumsum(negative_BG, axis=1) - negative_BG
    wins_B = np.sum(positive_BG * (below_BG + negative_BG / 2), axis=1)
    area_B: np.ndarray = wins_B / (positive_BG.sum(1) * negative_BG.sum(1))
    return area_B


Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "auc": macro_auc, "f1": macro_f1}


def classification_scores(
    probabilities_NC: np.ndarray,
    classes_N: np.ndarray,
    resamples: int,
    rng: np.random.Generator,
    metrics: Sequence[str] = tuple(CLASSIFICATION),
) -> dict[str, Score]:
    """Accuracy, macro AUC and macro F1 with intervals from a stratified bootstrap.

    Args:
        probabilities_NC: One row per sample; only their order matters, within a row and within a column.
        classes_N: The true class of each sample, 0..C-1; classes without samples take no part in AUC and F1.
        resamples: B. Each keeps the number of samples of every class.
        rng: The same state gives the same resamples, so that models can be compared on them.
        metrics: Which of the three.

    Raises:
        ValueError: Fewer than two classes occur.
    """
    chosen = {name: CLASSIFICATION[name] for name in metrics}
    once = np.ones((1, len(classes_N)))
    values = {name: float(metric(probabilities_NC, classes_N, once)[0]) for name, metric in chosen.items()}
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    at_once = max(1, CELLS_AT_ONCE // len(classes_N))
    for start in range(0, resamples, at_once):
        weights_BN = stratified_weights(classes_N, min(at_once, resamples - start), rng)
        for name, metric in chosen.items():
            chunks[name].append(metric(probabilities_NC, classes_N, weights_BN))
    return {name: Score(values[name], np.concatenate(chunks[name]), len(classes_N)) for name in chosen}


def multilabel_score(scores_NC: np.ndarray, truth_NC: np.ndarray, resamples: int, rng: np.random.Generator) -> Score:
    """:func:`multilabel_auc` with an interval from a plain bootstrap.

    Not a stratified one: almost every sample may have a set of classes of its own, and would then be in every resample.

    Args:
        scores_NC: One row per sample.
        truth_NC: Bool, any number of classes for a sample.
        resamples: B.
        rng: The same state gives the same resamples.

    Raises:
        ValueError: No class can be ranked.
    """
    count = len(truth_NC)
    value = float(multilabel_auc(scores_NC, truth_NC, np.ones((1, count)))[0])
    chunks = []
    at_once = max(1, CELLS_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        weights_BN = stratified_weights(np.zeros(count, int), min(at_once, resamples - start), rng)
        chunks.append(multilabel_auc(scores_NC, truth_NC, weights_BN))
    return Score(value, np.concatenate(chunks), count)


def stratified_weights(classes_N: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw with replacement within each class, as multiplicities: float64 [B, N], each row summing to N."""
    weights_BN = np.zeros((resamples, len(classes_N)))
    for label in np.unique(classes_N):
        members = np.flatnonzero(classes_N == label)
        drawn = members[rng.integers(len(members), size=(resamples, len(members)))]
        rows = np.arange(resamples)[:, None] * len(classes_N)
        counts = np.bincount((drawn + rows).ravel(), minlength=weights_BN.size)
        weights_BN += counts.reshape(weights_BN.shape)
    return weights_BN


def best_ranks(queries_QD: np.ndarray, candidates_MD: np.ndarray, matches_P2: np.ndarray) -> np.ndarray:
    """Rank (1 is best) of each query's best matching candidate by inner product.

    A query may match several candidates. Ties go against the query, so that a model which embeds everything
    alike ranks last, not first.

    Args:
        queries_QD: float32.
        candidates_MD: float32.
        matches_P2: int rows (query, candidate); every query has at least one.

    Returns:
        int64 [Q].
    """
    order = np.argsort(matches_P2[:, 0], kind="stable")
    query_P, candidate_P = matches_P2[order].T
    ranks_Q = np.empty(len(queries_QD), dtype=np.int64)
    at_once = max(1, CELLS_AT_ONCE // max(1, len(candidates_MD)))
    for start in range(0, len(queries_QD), at_once):
        scores = queries_QD[start : start + at_once] @ candidates_MD.T
        first, last = np.searchsorted(query_P, [start, start + len(scores)])
        rows, columns = query_P[first:last] - start, candidate_P[first:last]
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, scores[rows, columns])
        scores[rows, columns] = -np.inf  # other matches do not compete with the best one
        ranks_Q[start : start + len(scores)] = 1 + (scores >= best[:, None]).sum(1)
    return ranks_Q


def recall_at(ranks_Q: np.ndarray, k: int, resamples: int, rng: np.random.Generator) -> Score:
    """Share of queries with a match among the first ``k`` candidates.

    Drawing Q queries with replacement and counting hits is a binomial draw, so no resample is materialised.
    """
    queries = len(ranks_Q)
    value = float(np.mean(ranks_Q <= k))
    return Score(value, rng.binomial(queries, value, size=resamples) / queries, queries)
