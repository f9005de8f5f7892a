"""The same pictures, prompts, captions and weights as clip-benchmark was asked about, held to its stored answer."""

import json

from peer_evaluation import ANSWER, ANSWER_ROWS, read_rows, scores_of, write_lake, write_model, write_templates

from trainer.config import EvaluateConfig
from trainer.evaluation.models import find_model
from trainer.evaluation.run import evaluate

A_TIE = 1 / 100
"""Another processor may round two nearly equal cosines the other way round, for one picture."""


def test_scores_are_those_of_clip_benchmark(shared_data, tmp_path):
    answer = json.loads(ANSWER.read_text())
    lake = write_lake(tmp_path / "lake", read_rows(shared_data, ANSWER_ROWS))
    model = find_model(f"first={write_model(tmp_path / 'first', seed=0)}", {})
    templates = str(write_templates(tmp_path / "templates.yaml"))
    scores = evaluate(lake, [model], EvaluateConfig(templates=templates, bootstraps=2)).scores
    found = scores_of(scores.to_pylist())
    assert found.keys() == answer["scores"].keys()
    apart = {name: abs(value - found[name]) for name, value in answer["scores"].items()}
    assert all(gap <= A_TIE for gap in apart.values()), apart
    assert sum(gap > 1e-6 for gap in apart.values()) <= 1, apart
