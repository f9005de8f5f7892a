"""PHI-S: every dimension of a teacher's vectors gets mean 0 and variance 1 by a rotation and one factor.

From Ranzinger et al., "PHI-S: Distribution Balancing for Agglomerative Models" (arXiv 2410.01680): subtract the mean,
rotate to the principal axes, rotate on by a Hadamard matrix, which makes all variances equal, and divide by their root.
Unlike whitening it changes no direction's share in distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from common.errors import TrainError
from trainer.alignment.hadamard import spreading_rotation
from trainer.alignment.maps import AffineMap


@dataclass
class Moments:
    """Count, sum and sum of outer products of vectors that come in pieces; the memory is that of one matrix."""

    count: int = 0
    sum_T: np.ndarray = field(default_factory=lambda: np.zeros(0))
    product_TT: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, vectors_NT: np.ndarray) -> None:
        """Account for some vectors."""
        wide = vectors_NT.astype(np.float64)
        if not self.count:
            self.sum_T = np.zeros(wide.shape[1])
            self.product_TT = np.zeros((wide.shape[1], wide.shape[1]))
        self.count += len(wide)
        self.sum_T += wide.sum(axis=0)
        self.product_TT += wide.T @ wide

    def standardising(self, what: str) -> AffineMap:
        """The map for vectors like those that were added.

        Raises:
            TrainError: They are too few, or all the same; ``what`` says whose they are.
        """
        if self.count < 2:
            raise TrainError(f"There are {self.count} vectors of {what} to standardise by; loosen the selection.")
        mean_T = self.sum_T / self.count
        covariance_TT = self.product_TT / self.count - np.outer(mean_T, mean_T)
        variances_T, axes_TT = np.linalg.eigh(covariance_TT)
        scale = np.sqrt(max(variances_T.mean(), 0.0))
        if scale < 1e-6:
            raise TrainError(f"The vectors of {what} are all the same; the teacher's files are broken.")
        # An axis has no direction of its own; without a rule the fit would differ between machines.
        largest = np.abs(axes_TT).argmax(axis=0)
        axes_TT = axes_TT * np.sign(axes_TT[largest, np.arange(len(largest))])
        matrix_TT = axes_TT @ spreading_rotation(len(mean_T)).T / scale
        return AffineMap(matrix_TT.astype(np.float32), (-mean_T @ matrix_TT).astype(np.float32))
