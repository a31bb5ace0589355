"""Draw the curves of runs: `python tools/plot_run.py OUT.svg RUN [RUN ...]`. Needs matplotlib.

Reward, held-out accuracy, drift and step time over steps, one line a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from miles_lite.run import read_metrics

CURVES = (
    ("rollout/raw_reward", "mean raw reward", "linear"),
    ("train/train_rollout_logprob_abs_diff", "drift: |log p trainer − log p engine|", "log"),
    ("rollout/response_len/mean", "response tokens", "linear"),
    ("perf/step_time", "seconds a step", "linear"),
)


def main(words: Sequence[str]) -> None:
    import matplotlib  # pyright: ignore[reportMissingImports] (optional)

    matplotlib.use("svg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    out, folders = words[0], [Path(word) for word in words[1:]]
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3))
    for axis, (name, title, scale) in zip(axes, CURVES, strict=True):
        for folder in folders:
            points = [(s, m[name]) for s, m in read_metrics(folder).items() if name in m]
            axis.plot(*zip(*points, strict=True), label=folder.name, linewidth=1.2)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(1e-8, 1e-3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
