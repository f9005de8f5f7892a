import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from trainer.evaluation.metrics import (
    accuracy,
    best_ranks,
    classification_scores,
    macro_auc,
    macro_f1,
    mean_score,
    multilabel_auc,
    multilabel_score,
    recall_at,
    stratified_weights,
)


def ones(count: int) -> np.ndarray:
    return np.ones((1, count))


def predictions(samples: int, classes: int, seed: int, steps: int | None = None):
    """Probabilities with some skill; ``steps`` rounds the logits, so that many are tied."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), rng.integers(classes, size=samples - classes)])
    logits = rng.normal(size=(samples, classes)) + 1.2 * np.eye(classes)[truth]
    return softmax(np.round(logits * steps) / steps if steps else logits, axis=1), truth


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_equal_those_of_scikit_learn(classes):
    probabilities, truth = predictions(200, classes, seed=classes)
    reference = roc_auc_score(truth, probabilities if classes > 2 else probabilities[:, 1], multi_class="ovr")
    assert macro_auc(probabilities, truth, ones(200))[0] == pytest.approx(reference, abs=1e-12)
    predicted = probabilities.argmax(1)
    assert macro_f1(probabilities, truth, ones(200))[0] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert accuracy(probabilities, truth, ones(200))[0] == pytest.approx(accuracy_score(truth, predicted))


def test_auc_counts_ties_one_half_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, 300) / 4
    truth = (rng.random(300) < 0.3 + 0.4 * first).astype(int)
    assert macro_auc(np.stack([1 - first, first], 1), truth, ones(300))[0] == pytest.approx(roc_auc_score(truth, first))
    constant = np.full((4, 2), 0.5)
    assert macro_auc(constant, np.array([0, 1, 0, 1]), ones(4))[0] == pytest.approx(0.5)


def test_auc_by_hand():
    # The class-1 samples score 0.9 and 0.4, the others 0.5 and 0.1: three of the four pairs are in order.
    score = np.array([0.9, 0.4, 0.5, 0.1])
    value = macro_auc(np.stack([1 - score, score], 1), np.array([1, 1, 0, 0]), ones(4))[0]
    assert value == pytest.approx(0.75)


def test_a_resample_scores_as_if_its_samples_were_repeated():
    probabilities, truth = predictions(60, 3, seed=5, steps=2)
    weights = stratified_weights(truth, 4, np.random.default_rng(1))
    for row, metric in [(r, m) for r in weights for m in (accuracy, macro_f1, macro_auc)]:
        repeated = np.repeat(np.arange(60), row.astype(int))
        expected = metric(probabilities[repeated], truth[repeated], ones(60))[0]
        assert metric(probabilities, truth, row[None])[0] == pytest.approx(expected, abs=1e-12)


def test_stratified_weights_keep_the_size_of_every_class():
    truth = np.array([0] * 5 + [1] * 12 + [2])
    weights = stratified_weights(truth, 50, np.random.default_rng(0))
    for label, size in ((0, 5), (1, 12), (2, 1)):
        assert (weights[:, truth == label].sum(1) == size).all()
    assert len(np.unique(weights, axis=0)) > 40


def test_interval_has_the_width_that_theory_expects():
    # Accuracy of 400 samples, each right with chance p: the standard error is sqrt(p (1 - p) / n).
    probabilities, truth = predictions(400, 2, seed=3)
    score = classification_scores(probabilities, truth, 1000, np.random.default_rng(0))["accuracy"]
    low, high = score.interval()
    expected = 2 * 1.96 * np.sqrt(score.value * (1 - score.value) / 400)
    assert low < score.value < high
    assert high - low == pytest.approx(expected, rel=0.15)


def test_scores_do_not_depend_on_how_many_resamples_are_computed_at_once(monkeypatch):
    probabilities, truth = predictions(50, 3, seed=9)
    whole = classification_scores(probabilities, truth, 40, np.random.default_rng(2))
    monkeypatch.setattr("trainer.evaluation.metrics.CELLS_AT_ONCE", 50 * 7)
    parts = classification_scores(probabilities, truth, 40, np.random.default_rng(2))
    for name, score in whole.items():
        assert parts[name].value == score.value
        assert parts[name].resampled_B.shape == (40,)


def test_a_class_without_samples_takes_no_part():
    probabilities, truth = predictions(80, 3, seed=4)
    kept = truth != 2
    value = macro_f1(probabilities[kept], truth[kept], ones(kept.sum()))[0]
    expected = f1_score(truth[kept], probabilities[kept].argmax(1), labels=[0, 1], average="macro")
    assert value == pytest.approx(expected)
    assert 0 < macro_auc(probabilities[kept], truth[kept], ones(kept.sum()))[0] < 1


def test_auc_of_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        macro_auc(np.full((3, 2), 0.5), np.zeros(3, int), ones(3))


def multi_hot(samples: int, classes: int, seed: int):
    """Scores with some skill and truths of none to three classes; the scores are coarse, so that many are tied."""
    rng = np.random.default_rng(seed)
    truth = rng.random((samples, classes)) < 0.3
    return np.round(rng.normal(size=truth.shape) + truth, 1), truth


@pytest.mark.parametrize("classes", [2, 5])
def test_multilabel_auc_equals_that_of_scikit_learn(classes):
    scores, truth = multi_hot(150, classes, seed=classes)
    value = multilabel_auc(scores, truth, ones(150))[0]
    assert value == pytest.approx(roc_auc_score(truth, scores, average="macro"), abs=1e-12)


def test_multilabel_auc_leaves_out_classes_that_all_or_none_have():
    scores, truth = multi_hot(60, 4, seed=1)
    truth[:, 0], truth[:, 2] = True, False
    value = multilabel_auc(scores, truth, ones(60))[0]
    assert value == pytest.approx(roc_auc_score(truth[:, [1, 3]], scores[:, [1, 3]], average="macro"), abs=1e-12)
    with pytest.raises(ValueError, match="some samples have and some lack"):
        multilabel_auc(scores, np.ones_like(truth), ones(60))


def test_where_each_sample_has_one_class_multilabel_auc_is_the_same():
    probabilities, truth = predictions(90, 4, seed=2)
    value = multilabel_auc(probabilities, np.eye(4, dtype=bool)[truth], ones(90))[0]
    assert value == pytest.approx(macro_auc(probabilities, truth, ones(90))[0], abs=1e-12)


def test_a_multilabel_resample_scores_as_if_its_samples_were_repeated():
    scores, truth = multi_hot(40, 3, seed=3)
    for row in stratified_weights(np.zeros(40, int), 5, np.random.default_rng(0)):
        repeated = np.repeat(np.arange(40), row.astype(int))
        expected = roc_auc_score(truth[repeated], scores[repeated], average="macro")
        assert multilabel_auc(scores, truth, row[None])[0] == pytest.approx(expected, abs=1e-12)


def test_a_class_that_a_resample_lacks_is_left_out_of_it():
    scores = np.array([[0.1, 0.9], [0.4, 0.2], [0.3, 0.8], [0.2, 0.1]])
    truth = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    without_second = np.array([[0, 2, 0, 2.0]])  # nobody has the second class; the first is told apart
    nothing = np.array([[4, 0, 0, 0.0]])
    assert multilabel_auc(scores, truth, without_second)[0] == 1.0
    assert multilabel_auc(scores, truth, nothing)[0] == 0.5


def test_a_multilabel_score_has_an_interval_around_it(monkeypatch):
    scores, truth = multi_hot(200, 3, seed=4)
    score = multilabel_score(scores, truth, 400, np.random.default_rng(0))
    low, high = score.interval()
    assert score.n == 200
    assert low < score.value < high
    # Hanley and McNeil's standard error of an AUC near 0.76 of 60 against 140 is 0.037; of a mean of three 0.022.
    assert high - low == pytest.approx(2 * 1.96 * 0.022, rel=0.25)
    monkeypatch.setattr("trainer.evaluation.metrics.CELLS_AT_ONCE", 200 * 7)
    assert multilabel_score(scores, truth, 15, np.random.default_rng(0)).resampled_B.shape == (15,)


def test_mean_score_averages_values_and_resamples():
    rng = np.random.default_rng(0)
    first, second = (recall_at(rng.integers(1, 9, 100), 3, 500, rng) for _ in range(2))
    mean = mean_score([first, second])
    assert mean.value == pytest.approx((first.value + second.value) / 2)
    assert mean.n == 200
    spread = [np.diff(score.interval())[0] for score in (first, second, mean)]
    assert spread[2] < min(spread[:2])  # two independent halves are known better than each


def test_ranks_by_hand_with_several_right_answers():
    queries = np.eye(3, dtype=np.float32)
    candidates = np.array([[0.9, 0, 0.1], [0.5, 0.2, 0.8], [0.7, 0.6, 0.3], [0.1, 0.9, 0.2]], np.float32)
    # Query 0 orders them 0 2 1 3, query 1: 3 2 1 0, query 2: 1 2 3 0.
    matches = np.array([[0, 1], [1, 2], [0, 3], [2, 0], [2, 2]])
    assert best_ranks(queries, candidates, matches).tolist() == [3, 2, 2]


def test_several_right_answers_do_not_compete_with_each_other():
    candidates = np.array([[1.0], [0.9], [0.8], [0.7]], np.float32)
    matches = np.array([[0, 0], [0, 1], [0, 2]])
    assert best_ranks(np.ones((1, 1), np.float32), candidates, matches).tolist() == [1]


def test_a_model_that_embeds_everything_alike_ranks_last():
    same = np.ones((6, 2), np.float32)
    matches = np.stack([np.arange(6)] * 2, 1)
    assert best_ranks(same, same, matches).tolist() == [6] * 6


def test_ranks_do_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=(n, 8)).astype(np.float32) for n in (37, 53))
    matches = np.concatenate([np.stack([np.arange(37), rng.integers(53, size=37)], 1) for _ in range(2)])
    whole = best_ranks(queries, candidates, matches)
    monkeypatch.setattr("trainer.evaluation.metrics.CELLS_AT_ONCE", 5 * 53)
    assert (best_ranks(queries, candidates, matches) == whole).all()


def test_recall_counts_ranks_within_the_cutoff():
    score = recall_at(np.array([1, 2, 5, 6, 11]), 5, 2000, np.random.default_rng(0))
    assert score.value == pytest.approx(0.6)
    low, high = score.interval()
    assert 0.0 <= low < 0.6 < high <= 1.0
