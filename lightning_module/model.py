"""The training task: predict the next token of running text with a recurrent layer."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_module.data.chunks import IGNORE, Chunk
from lightning_module.distributed import ranks
from lightning_module.errors import RunError
from lightning_module.training_progress import progress
from triton_gru import GRU

# The recurrent layers by the name that `model/layer_type=` takes. Looked up by name, never imported
# by a path found in a checkpoint: loading a file of unknown origin must not run code of its author.
LAYER_TYPES: dict[str, Callable[..., nn.Module]] = {
    "gru": GRU,
    "gru_reset_before": lambda *args, **kwargs: GRU(*args, reset_after=False, **kwargs),
    "lstm": nn.LSTM,
    "rnn": nn.RNN,
}

# From this vocabulary size on the training loss is torch's fused `linear_cross_entropy`, which
# never holds all logits at once. On two cores it took 0.80 to 1.02 of the plain loss's time at 4000
# to 32000 tokens, and gained nothing below (benchmarks/output_loss.py).
FUSED_LOSS_VOCABULARY = 4000

State = Tensor | tuple[Tensor, ...]


class TokenScores(NamedTuple):
    """The result of `Trainer.predict` for each chunk.

    Attributes:
        nats: loss of each target in nats, `[T, B]`; NaN where there is nothing to predict.
        likeliest: id of the likeliest token at each index, int64 `[T, B]`.
    """

    nats: Tensor
    likeliest: Tensor


class SentencePredictor(L.LightningModule):
    """Embedding, recurrent layer, dropout and output layer, trained to predict the next token.

    The rows of a batch are consecutive text: the state at the end of a chunk is detached and
    starts the next one, except in rows with `Chunk.fresh`, where a document begins and the state
    starts from zero.

    Args:
        vocab_size: number of tokens, V.
        layer_type: `name`, one of `LAYER_TYPES`, and keyword arguments of that layer (for the GRUs
            `backend`).
        embedding_size: size E of a token's vector; characters need little (64 is enough for 84
            characters).
        hidden_size: H.
        num_layers: stacked recurrent layers.
        dropout: probability, applied to the embedding, between layers and before the output;
            see `LockedDropout`.
        tie_weights: share the embedding with the output; a projection H -> E is added if H != E.
        chars_per_token: mean length of a token of the validation text; converts nats per token to
            bits per character.
        optimizer: builds the optimizer from an iterable of parameters; needed only to train.
        schedule: factor on the learning rate as a function of the run's progress, see `schedules`.
        core: former name of `layer_type`, which older checkpoints hold.

    Raises:
        ValueError: unknown layer, or a size or probability out of range.

    Example:
        >>> model = SentencePredictor(vocab_size=80, hidden_size=32)
        >>> logits, state = model(torch.randint(80, (16, 4)))  # 16 tokens of 4 rows
        >>> logits.shape
        torch.Size([16, 4, 80])
    """

    def __init__(
        self,
        vocab_size: int,
        layer_type: Mapping[str, Any] | None = None,
        embedding_size: int = 64,
        hidden_size: int = 256,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_weights: bool = False,
        chars_per_token: float = 1.0,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[float], float] = lambda used: 1.0,
        core: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if core is not None:
            warnings.warn("core is called layer_type now", FutureWarning, stacklevel=2)
        layer = dict(layer_type or core or {"name": "gru"})
        self.save_hyperparameters(
            ignore=["optimizer", "schedule", "layer_type", "core"], logger=False
        )
        self.save_hyperparameters({"layer_type": dict(layer)}, logger=False)
        name = layer.pop("name", None)
        if name not in LAYER_TYPES:
            raise ValueError(
                f"model.layer_type.name must be one of {', '.join(LAYER_TYPES)}; got {name!r}"
            )
        for what, value in {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"model.{what} must be a whole number of at least 1; got {value!r}"
                )
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout must be at least 0 and below 1; got {dropout!r}")

        self.embedding = nn.Embedding(vocab_size, embedding_size)
        between_layers = dropout if num_layers > 1 else 0.0
        # Not renamed: the names of the weights in checkpoints begin with it.
        self.core = LAYER_TYPES[name](
            embedding_size, hidden_size, num_layers=num_layers, dropout=between_layers, **layer
        )
        self.dropout = LockedDropout(dropout)
        self.to_embedding = (
            nn.Linear(hidden_size, embedding_size, bias=False)
            if tie_weights and hidden_size != embedding_size
            else nn.Identity()
        )
        self.output = nn.Linear(embedding_size if tie_weights else hidden_size, vocab_size)
        if tie_weights:
            # Scale of the output: logits start near zero, so the first loss is log V.
            nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
            self.output.weight = self.embedding.weight
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.carried: dict[str, State | None] = dict.fromkeys(("train", "val", "test", "predict"))
        self._resumed_rng: list[dict[str, Tensor]] = []
        # Tokens of each chunk of the current step; checkpoints are never saved within a step.
        self._tokens_of_step: list[int] = []
        self.val_nll = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.val_top1 = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.val_top5 = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` for the computation of a step; arguments are those of `torch.compile`."""
        # Attributes of the instance, which hide the methods.
        vars(self)["features"] = torch.compile(self.features, *args, **kwargs)
        vars(self)["_nll"] = torch.compile(self._nll, *args, **kwargs)

    def describe(self) -> str:
        """The model in a line for users: its parts, their parameters, the total size."""
        own = self.output if not self.hparams["tie_weights"] else None
        parts = {
            "embedding": self.embedding,
            f"{self.hparams['num_layers']} x {self.hparams['layer_type']['name']}": self.core,
            "projection": self.to_embedding,
            "output": own,
        }
        counts = {
            name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part
        }
        parameters = list(self.parameters())  # tied parameters count once
        size = sum(p.numel() * p.element_size() for p in parameters) / 1e6
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        total = sum(p.numel() for p in parameters)
        hidden = self.hparams["hidden_size"]
        return f"Model of {total:,} parameters ({size:.1f} MB), hidden size {hidden}: {listed}"

    @property
    def takes_resets(self) -> bool:
        """Whether the layer supports resets inside a row, as `data.batching=packed` needs."""
        return isinstance(self.core, GRU)

    def forward(
        self, tokens: Tensor, state: State | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The logits of every possible next token.

        Args:
            tokens: int64 `[T, B]`, time first.
            state: the state that an earlier call returned, or None for zeros.
            resets: bool `[T, B]`, where the state is zero before a token; needs
                `takes_resets`.

        Returns:
            Logits `[T, B, V]` and the state after the last token.
        """
        features, state = self.features(tokens, state, resets)
        return self.output(features), state

    def features(
        self, tokens: Tensor, state: State | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The input of the output layer, `[T, B, H]` (tied: `[T, B, E]`), and the state."""
        options = {} if resets is None else {"resets": resets}
        hidden, state = self.core(self.dropout(self.embedding(tokens)), state, **options)
        return self.to_embedding(self.dropout(hidden)), state

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The logits after one more token per row, for decoding.

        Args:
            tokens: int64 `[B]`.
            state: the state that an earlier call returned, or None for zeros.

        Returns:
            Logits `[B, V]` and the state after the token.
        """
        if not isinstance(self.core, GRU):
            logits, state = self(tokens.unsqueeze(0), state)
            return logits.squeeze(0), state
        assert not isinstance(state, tuple), "the state of a GRU is one tensor"
        x = self.dropout(self.embedding(tokens).unsqueeze(0))  # [1, B, E], as LockedDropout expects
        hidden, state = self.core.step(x.squeeze(0), state)
        hidden = self.dropout(hidden.unsqueeze(0)).squeeze(0)
        return self.output(self.to_embedding(hidden)), state

    def training_step(self, batch: Chunk, batch_idx: int) -> Tensor:
        features, state = self.features(batch.inputs, self._carried("train", batch), batch.resets)
        self.carried["train"] = map_state(state, torch.detach)
        # The mean over the tokens of all ranks, however many each has: strategies average the
        # gradients of the ranks (and loggers the losses), hence the factor.
        count = max(batch.token_count(), 1)
        loss = self._nll(features, batch.targets) * (ranks.size() / count)
        self.log("train_loss", loss.detach(), batch_size=batch.targets.shape[1], sync_dist=True)
        accumulated = self._accumulated_batches()
        if accumulated == 1:
            return loss
        if batch_idx % accumulated == 0:  # where Lightning zeroes the gradients
            self._tokens_of_step = []
        self._tokens_of_step.append(count)
        return loss * (count / self._tokens_of_step[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradients of an accumulated step those of the mean over its tokens.

        Lightning divides every loss by `accumulate_grad_batches`, also in an incomplete
        accumulation at the end of a pass (pytorch-lightning#19987), and gives chunks the same
        weight for any number of tokens. The tokens of a step are known only when it is due.
        """
        accumulated, tokens = self._accumulated_batches(), self._tokens_of_step
        if accumulated == 1 or sum(tokens) == accumulated * tokens[0]:
            return
        factor = accumulated * tokens[0] / sum(tokens)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _accumulated_batches(self) -> int:
        return self._trainer.accumulate_grad_batches if self._trainer is not None else 1

    def on_validation_epoch_start(self) -> None:
        self.carried["val"] = None

    def validation_step(self, batch: Chunk, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        self.carried["test"] = None

    def test_step(self, batch: Chunk, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: Chunk) -> None:
        logits = self._scores(stage, batch)
        real = batch.targets != IGNORE
        logits, targets = logits[real].float(), batch.targets[real]
        if not len(targets):
            return
        score = logits.gather(1, targets[:, None])
        # The rank counts ties and NaN against the model: a diverged model must not score as right.
        rank = len(logits[0]) - (logits < score).sum(1)
        self.val_nll.update(F.cross_entropy(logits, targets, reduction="none"))
        self.val_top1.update((rank <= 1).float())
        self.val_top5.update((rank <= 5).float())

    def _log_metrics(self, stage: str) -> None:
        loss = self.val_nll.compute()
        self.log_dict(
            {
                f"{stage}_loss": loss,
                f"{stage}_perplexity": loss.exp(),
                f"{stage}_bits_per_char": loss / math.log(2) / self.hparams["chars_per_token"],
                f"{stage}_top1": self.val_top1.compute(),
                f"{stage}_top5": self.val_top5.compute(),
            }
        )
        for metric in (self.val_nll, self.val_top1, self.val_top5):
            metric.reset()
        self.carried[stage] = None

    def on_predict_epoch_start(self) -> None:
        self.carried["predict"] = None

    def predict_step(self, batch: Chunk, batch_idx: int) -> TokenScores:
        logits = self._scores("predict", batch).float()
        targets = batch.targets.flatten()
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="none"
        ).masked_fill(targets == IGNORE, torch.nan)
        return TokenScores(nats.view_as(batch.targets), logits.argmax(-1))

    def _scores(self, stage: str, batch: Chunk) -> Tensor:
        """Logits `[T, B, V]`; keeps the state for the stage's next chunk."""
        logits, state = self(batch.inputs, self._carried(stage, batch), batch.resets)
        self.carried[stage] = state
        return logits

    def configure_model(self) -> None:
        # Lightning calls it once the ranks are connected; it acts for strategy=fsdp alone.
        if self.device_mesh is None or isinstance(self.output.weight, DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        tied = self.output.weight is self.embedding.weight
        for part in (self.core, self.to_embedding):
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
        if tied:
            fully_shard([self.embedding, self.output], mesh=mesh)
        else:
            for part in (self.embedding, self.output):
                fully_shard(part, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.optimizer_factory is None:
            raise ValueError(
                "to train, SentencePredictor needs optimizer=, as in partial(AdamW, lr=4e-3)"
            )
        try:
            optimizer = self.optimizer_factory(self.parameters())
            # LambdaLR passes its own step count; `progress` uses steps, epochs or time, whichever
            # ends first.
            schedule = LambdaLR(optimizer, lambda _: self._lr_factor())
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the settings of optimizer or scheduler cannot be used: {error}"
            ) from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Lightning refuses fused optimizers, because they undo the scale of fp16's gradients
            # themselves; gradients of bf16 have no scale.
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Needed to resume the same run: the state of every row, and the random number generators
        # of each rank's dropout.
        checkpoint["carried_state"] = ranks.gathered_rows(self.carried["train"])
        checkpoint["rng_states"] = ranks.gathered(self._rng_states())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.carried["train"] = ranks.own_rows(checkpoint.get("carried_state"))
        self._resumed_rng = checkpoint.get("rng_states", [])

    def on_train_start(self) -> None:
        # A checkpoint of fewer ranks has none for the others: their masks are new ones.
        if ranks.rank() < len(self._resumed_rng):
            saved = self._resumed_rng[ranks.rank()]
            torch.set_rng_state(saved["cpu"])
            if self.device.type in saved and self.device.type != "cpu":
                torch.get_device_module(self.device).set_rng_state(saved[self.device.type])
        elif ranks.rank() > 0:  # otherwise all ranks would drop the same features
            torch.manual_seed(torch.initial_seed() + ranks.rank())

    def _rng_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return states

    def _lr_factor(self) -> float:
        return self.schedule(progress(self._trainer) if self._trainer is not None else 0.0)

    def _carried(self, stage: str, batch: Chunk) -> State | None:
        state = self.carried[stage]
        if state is None:
            return None
        keep = ~batch.fresh
        # where(), not a product: after an overflow in one document 0 * inf = NaN would enter the
        # next.
        return map_state(state, lambda s: torch.where(keep[None, :, None], s.to(self.device), 0.0))

    def _nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Sum over the targets that are not `IGNORE`."""
        features, targets = features.flatten(0, 1), targets.flatten()
        # FSDP gathers the module's shards only when the module is called.
        whole = not isinstance(self.output.weight, DTensor)
        large = self.hparams["vocab_size"] >= FUSED_LOSS_VOCABULARY
        if whole and large and hasattr(F, "linear_cross_entropy"):
            return F.linear_cross_entropy(
                features,
                self.output.weight,
                targets,
                linear_bias=self.output.bias,
                ignore_index=IGNORE,
                reduction="sum",
            )
        logits = self.output(features).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class LockedDropout(nn.Module):
    """Dropout with one mask for all time steps of a chunk (Gal and Ghahramani 2016).

    It regularises recurrent language models better than a mask per step, and draws T times fewer
    random numbers: with a mask per step they took 13 % of a step (T64 B64 H512, two cores).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops features of `x`, `[T, B, F]`, the same ones at every step."""
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(1, *x.shape[1:]), self.p)


def map_state(state: State, function: Callable[[Tensor], Tensor]) -> State:
    """Applies `function` to a state, which for an LSTM is a pair."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
