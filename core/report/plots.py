"""The pictures of a report."""

import io
from typing import Any

Record = dict[str, Any]
PICTURE = "checkpoints/learning-curves.svg"


def picture(finished: list[Record]) -> bytes:
    """Validation and train curves of the finished runs as SVG; equal records give equal bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: Any = {"svg.hashsalt": "cifar10-mlp", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for record in finished:
            epochs = [entry["epoch"] for entry in record["history"]]
            for ax, quantity, factor in zip(axes, ("accuracy", "loss"), (100, 1), strict=True):
                validation = [factor * entry[f"val_{quantity}"] for entry in record["history"]]
                train = [factor * entry[f"train_{quantity}"] for entry in record["history"]]
                (line,) = ax.plot(epochs, validation, label=record["name"], marker="." if len(epochs) == 1 else None)
                ax.plot(epochs, train, color=line.get_color(), linestyle=":", alpha=0.7)
        for ax, label in zip(axes, ("accuracy (%)", "cross-entropy"), strict=True):
            ax.set(xlabel="epoch", ylabel=label)
            ax.grid(alpha=0.3)
        axes[0].set_title("solid: validation · dotted: train, while training", fontsize=9, loc="left")
        if finished:
            axes[1].legend(fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()
