"""The lines that the logs of the challenge have: what its readers and scripts look for.

The program that ships prints them while it runs, and the stage submission makes them of what the stages wrote. Source:
the challenge's train_gpt.py; training.md 2.15 and evaluate.md 7 list its lines.
"""

from fairway.runtime.progress import Figures


def step_line(step: int, max_steps: int, figures: Figures, clock_s: float | None) -> str:
    """The losses of a step, or of the validation behind it, and the seconds of the training clock until then.

    The clock is left out where it is None.
    """
    shown = [f"{name}:{figures[name]:.4f}" for name in ("train_loss", "val_loss", "val_bpb") if name in figures]
    if clock_s is not None:
        shown += [f"train_time:{clock_s * 1000:.0f}ms", f"step_avg:{clock_s * 1000 / max(step, 1):.2f}ms"]
    return " ".join([f"step:{step}/{max_steps}", *shown])


def end_line(stopped_by: str, step: int, max_steps: int, clock_s: float) -> str:
    """Why training ended, "wallclock" or "steps", and where. The challenge knows the first reason alone."""
    why = "stopping_early: wallclock_cap" if stopped_by == "wallclock" else f"stopped_by:{stopped_by}"
    return f"{why} train_time:{clock_s * 1000:.0f}ms step:{step}/{max_steps}"


def epoch_lines(losses: list[float]) -> str:
    """The mean loss of each epoch of adaptation, in nats per token."""
    return "\n".join(f"adapt:{epoch}/{len(losses)} loss:{loss:.4f}" for epoch, loss in enumerate(losses, 1))


def size_lines(code_bytes: int, model_bytes: int) -> str:
    """The bytes of the program and of the compressed model, and both together: what the cap is for."""
    total = f"Total submission size: {code_bytes + model_bytes} bytes"
    return f"Code size: {code_bytes} bytes\nSerialized model: {model_bytes} bytes\n{total}"


def score_line(evaluator: str, val_loss: float, val_bpb: float, eval_s: float) -> str:
    """The score: nats per token, bits per byte, and the seconds that the evaluation took."""
    return f"final_{evaluator}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{eval_s * 1000:.0f}ms"
