"""Which rows have a caption: a picture that serves evaluation alone has none, and whatever needs a text skips it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def captioned(captions: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Bool [N] of the ``captions`` column of pairs: where there is at least one."""
    return np.asarray(pc.fill_null(pc.list_value_length(captions), 0)) > 0
