"""What a selection came to, for people: text tables, totals and a heat map of what is kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.selection.tally import Tally

INCH = 0.55


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """Teachers by modalities: skill and share of samples kept, as an aligned text table."""
    return _table(summary, _kept)


def format_found_first(summary: dict[str, dict[str, Any]]) -> str:
    """Teachers by modalities: how often the caption ranks first, of all samples -> of those kept, as such a table."""
    return _table(summary, _found_first)


def _kept(entry: dict[str, Any]) -> str:
    unscored = "images only" if entry["competent"] else "no vectors"
    skill = unscored if entry["skill"] is None else f"skill {entry['skill']:.2f}"
    return f"{skill} kept {entry['kept']:.0%}"


def _found_first(entry: dict[str, Any]) -> str:
    before, after = ("-" if share is None else f"{share:.1%}" for share in entry["found_first"])
    return "-" if entry["found_first"][0] is None else f"{before} -> {after}"


def _table(summary: dict[str, dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    modalities = modalities_of(summary)
    rows = [["teacher", *modalities]]
    rows += [[name, *(cell(entries[modality]) for modality in modalities)] for name, entries in summary.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ("".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def format_totals(counts: Tally) -> str:
    """One sentence: the share kept over all teachers and modalities, and how many rows nobody speaks for."""
    kept, eligible = (sum(getattr(count, name) for count in counts.teachers.values()) for name in ("kept", "eligible"))
    rows, alone = (sum(heard[place] for heard in counts.modalities.values()) for place in (0, 1))
    return (
        f"kept {kept / max(eligible, 1):.0%} overall ({kept:,} of {eligible:,}, a row counting once for each teacher "
        f"that has vectors of it); {alone:,} of {rows:,} rows ({alone / max(rows, 1):.0%}) have no teacher"
    )


def format_silent(counts: Tally, summary: dict[str, dict[str, Any]]) -> str:
    """The modalities for whose rows no teacher may speak, each with its rows and best skill; empty if there is none."""
    found = []
    for modality, (rows, alone) in counts.modalities.items():
        if alone < rows:
            continue
        skills = [(entries[modality]["skill"], teacher) for teacher, entries in summary.items()]
        best = max((one for one in skills if one[0] is not None), default=None)
        found.append(
            f"{modality} ({rows:,} rows, {f'best skill {best[0]:.2f} of {best[1]}' if best else 'no vectors'})"
        )
    return ", ".join(found)


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
