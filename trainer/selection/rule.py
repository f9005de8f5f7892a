"""Second pass: score every row by what the first found, and decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from common.schemas import SELECTION
from trainer.config import SelectConfig
from trainer.selection.read import ShardRows, ShardVectors
from trainer.selection.survey import Modality


@dataclass
class Verdict:
    """A teacher in one modality."""

    found: Modality
    skill: float
    competent: bool


@dataclass
class Rule:
    """A teacher's verdicts and the thresholds."""

    config: SelectConfig
    verdicts: dict[str, Verdict | None] = field(default_factory=dict)
    """Modality -> verdict; None where the teacher has no pair of vectors."""

    @classmethod
    def of(cls, survey: dict[str, Modality | None], config: SelectConfig) -> Rule:
        """Judge a teacher by its sampled pairs, each ranked among the others' captions."""
        return cls(
            config, {name: None if found is None else cls._judge(found, config) for name, found in survey.items()}
        )

    @classmethod
    def _judge(cls, found: Modality, config: SelectConfig) -> Verdict:
        cosine_C = np.einsum("nd,nd->n", found.image_CD, found.text_CD)
        _, _, beaten_C = found.ranks(found.image_CD, cosine_C, found.keys_C)
        skill = float(beaten_C.mean())
        return Verdict(found, skill, skill >= config.min_skill)

    def decide(self, rows: ShardRows, vectors: ShardVectors) -> pa.Table:
        """A shard of the selection: schema :data:`common.schemas.SELECTION`, row-aligned with the pairs."""
        count, scored_N = len(rows.sample_id), vectors.scored
        cosine_N, quantile_N = (np.full(count, np.nan, np.float32) for _ in range(2))
        rank_N, among_N = (np.zeros(count, np.int32) for _ in range(2))
        admitted_N = np.zeros(count, bool)
        for modality in np.unique(rows.modality_N):
            all_N = rows.modality_N == modality
            verdict = self.verdicts[modality]
            if verdict is None:
                continue
            here = np.flatnonzero(all_N & scored_N)
            image, text = vectors.image_ND[here], vectors.text_ND[here]
            cosine_N[here] = np.einsum("nd,nd->n", image, text)
            rank_N[here], among_N[here], _ = verdict.found.ranks(image, cosine_N[here], rows.caption_key_N[here])
            quantile_N[here] = verdict.found.quantiles(cosine_N[here])
            keeps = _keeps(self.config, quantile_N[here], rank_N[here], among_N[here])
            admitted_N[here] = keeps & verdict.competent
        unknown_N = ~np.isfinite(cosine_N)
        columns = [
            pa.array(rows.sample_id, pa.string()),
            pa.array(rows.modality_N, pa.string()),
            *(pa.array(values, mask=unknown_N) for values in (cosine_N, quantile_N, rank_N, among_N)),
            pa.array(admitted_N),
        ]
        return pa.table(columns, schema=SELECTION)

    def summary(self) -> dict[str, Any]:
        """Modality -> skill, competence, mean cosine; what the rule came to is counted afterwards."""
        return {
            modality: {"skill": None, "competent": False, "mean_cosine": None}
            if verdict is None
            else {
                "skill": round(verdict.skill, 4),
                "competent": verdict.competent,
                "mean_cosine": round(verdict.found.total / max(verdict.found.count, 1), 4),
            }
            for modality, verdict in self.verdicts.items()
        }


def _keeps(config: SelectConfig, quantile_N: np.ndarray, rank_N: np.ndarray, among_N: np.ndarray) -> np.ndarray:
    kept_N = quantile_N > 1 - config.keep_fraction
    kept_N |= config.keep_fraction == 1
    return kept_N & (rank_N <= np.maximum(1, config.max_rank_fraction * among_N))
