"""Shape classes and their verdicts."""

import dataclasses
import datetime
import math
from typing import Any

import torch

# Steps of the two timed sequences: their difference is the time of steps, without the launch. The
# long one keeps a GPU busy for longer than the host needs to issue a call, so that the difference
# is the GPU's time.
SHORT, LONG = 16, 528
# The kernels run if they take at most this share of the competitor's time.
FASTER = 0.9


@dataclasses.dataclass(frozen=True)
class ShapeClass:
    """The calls for which one verdict is valid.

    Attributes:
        reset_after: The variant.
        dtype: "float32", "tf32" (float32 tensors, `torch.backends.cudnn.allow_tf32`), "float16" or
            "bfloat16".
        hidden: hidden_size.
        directions: 1, or 2 for a bidirectional layer.
        batch: The measured batch size, a power of two. None means every batch size.
    """

    reset_after: bool
    dtype: str
    hidden: int
    directions: int
    batch: int | None

    @classmethod
    def of(
        cls,
        *,
        reset_after: bool,
        dtype: torch.dtype,
        hidden_size: int,
        directions: int,
        batch_size: int | None,
    ) -> "ShapeClass":
        """The class of a layer and its batch, with torch's current precision settings."""
        name = str(dtype).removeprefix("torch.")
        if name == "float32" and torch.backends.cudnn.allow_tf32:
            name = "tf32"
        batch = None if batch_size is None else 1 << max(0, batch_size - 1).bit_length()
        return cls(reset_after, name, hidden_size, directions, batch)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def competitor(self) -> str:
        """The implementation without the kernels, which must be faster."""
        return "cuDNN" if self.reset_after else "plain torch"

    def key(self, training: bool) -> str:
        """Its name in a file; without a batch, the common beginning of its batches' names."""
        variant = "reset_after" if self.reset_after else "reset_before"
        mode = "training" if training else "inference"
        text = f"{variant} {self.dtype} H{self.hidden} D{self.directions} {mode} B"
        return text if self.batch is None else f"{text}{self.batch}"

    def describe(self) -> str:
        """The class in words."""
        variant = "" if self.reset_after else " reset_after=False"
        both = " bidirectional" if self.directions == 2 else ""
        return f"{self.dtype} H {self.hidden} B {self.batch}{both}{variant}"

    def command(self) -> str:
        """The command that measures it."""
        words = [f"python -m triton_gru check --hidden-size {self.hidden} --dtype {self.dtype}"]
        if self.batch is not None:
            words.append(f"--batch-size {self.batch}")
        if self.directions == 2:
            words.append("--bidirectional")
        if not self.reset_after:
            words.append("--reset-before")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the check of one class, for inference or for training.

    Attributes:
        day: The date, as 2026-11-29.
        failure: The fault of the kernels; None if they passed.
        kernel_us: Microseconds of whole calls of `SHORT` and of `LONG` steps with the kernels.
        other_us: The same with the competitor of the class.
    """

    day: str
    failure: str | None
    kernel_us: tuple[float, float] | None = None
    other_us: tuple[float, float] | None = None

    @classmethod
    def today(cls, failure: str | None, **times: tuple[float, float]) -> "Verdict":
        """A verdict of today."""
        return cls(datetime.date.today().isoformat(), failure, **times)

    @classmethod
    def read(cls, record: Any) -> "Verdict":
        """From the record of a file.

        Raises:
            ValueError: It is not a verdict.
        """
        if not isinstance(record, dict) or not isinstance(record.get("day"), str):
            raise ValueError("no verdict")
        failure = record.get("failure")
        if failure is not None:
            return cls(record["day"], str(failure))
        return cls(record["day"], None, _times(record, "kernel_us"), _times(record, "other_us"))

    def record(self) -> dict[str, Any]:
        """The record for a file."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def kernel_step_us(self) -> float:
        """Microseconds per step with the kernels."""
        return _per_step(self.kernel_us)

    @property
    def other_step_us(self) -> float:
        """Microseconds per step with the competitor."""
        return _per_step(self.other_us)

    @property
    def from_steps(self) -> int | None:
        """The least number of steps for which a call is faster by a tenth, launch included.

        None: there is no such number, or the kernels failed. Never less than `SHORT`.
        """
        if self.failure is not None or self.kernel_us is None or self.other_us is None:
            return None
        gained = FASTER * self.other_step_us - self.kernel_step_us
        if gained < 0:
            return None
        late = self.kernel_us[0] - FASTER * self.other_us[0]  # at SHORT
        if late <= 0:
            return SHORT
        return SHORT + math.ceil(late / gained) if gained > 0 else None


def _times(record: dict[str, Any], name: str) -> tuple[float, float]:
    pair = record.get(name)
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError("a verdict without its times")
    if not all(type(t) in (int, float) and math.isfinite(t) and t > 0 for t in pair):
        raise ValueError("a verdict whose times are no times")
    return float(pair[0]), float(pair[1])


def _per_step(times: tuple[float, float] | None) -> float:
    return math.nan if times is None else max(0.0, times[1] - times[0]) / (LONG - SHORT)
