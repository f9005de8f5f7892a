"""What a selection came to, for people: a text table and a heat map of what is kept."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

INCH = 0.55


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """Teachers by modalities: skill and share of samples kept, as an aligned text table."""
    modalities = modalities_of(summary)
    width = max(len(name) for name in [*summary, "teacher"]) + 2
    cell = max(20, *(len(modality) + 2 for modality in modalities))
    lines = ["teacher".ljust(width) + "".join(modality.ljust(cell) for modality in modalities)]
    for teacher, by_modality in summary.items():
        cells = []
        for modality in modalities:
            entry = by_modality[modality]
            unscored = "images only" if entry["competent"] else "no vectors"
            skill = unscored if entry["skill"] is None else f"skill {entry['skill']:.2f}"
            cells.append(f"{skill} kept {entry['kept']:.0%}".ljust(cell))
        lines.append(teacher.ljust(width) + "".join(cells))
    return "\n".join(lines)


def modalities_of(summary: dict[str, dict[str, Any]]) -> list[str]:
    """All modalities of a summary, sorted."""
    return sorted({modality for by_modality in summary.values() for modality in by_modality})


def keep_rates_chart(summary: dict[str, dict[str, Any]]) -> str:
    """A heat map, teachers by modalities, of the share of samples for which a teacher may speak: SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    teachers, modalities = list(summary), modalities_of(summary)
    rates = np.array([[summary[teacher][modality]["kept"] for modality in modalities] for teacher in teachers])
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmkd", "font.size": 9}):
        figure = Figure(figsize=(2.5 + 2 * INCH * len(modalities), 1.2 + INCH * len(teachers)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(rates, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(modalities)), modalities, rotation=30, ha="right")
        axes.set_yticks(range(len(teachers)), teachers)
        for (row, column), rate in np.ndenumerate(rates):
            axes.text(column, row, f"{rate:.0%}", ha="center", va="center", color="white" if rate < 0.6 else "black")
        axes.set_title("Share of samples for which a teacher may speak", loc="left", fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
