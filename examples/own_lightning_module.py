"""Train your own LightningModule with this project's GRU.

Run it with `python examples/own_lightning_module.py`.

The task: read a row of numbers and predict the sign of the first one. The rows differ in length:
`lengths` is passed with the padded batch, without packing. A module that builds torch.nn.GRU
itself needs no change: give the trainer `callbacks=[lightning_module.UseTritonGRU()]`.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from triton_gru import GRU


class SignOfTheFirst(L.LightningModule):
    """A GRU that reads rows of numbers, and a linear layer on its last state."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.gru = GRU(1, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """A logit for each row of x [batch, steps, 1]."""
        _, h_n = self.gru(x, lengths=lengths)
        return self.output(h_n[-1]).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, lengths, target = batch
        return F.binary_cross_entropy_with_logits(self(x, lengths), target)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Logs the share of rows answered correctly."""
        x, lengths, target = batch
        correct = (self(x, lengths) > 0) == target.bool()
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def rows(number: int, steps: int = 20) -> DataLoader:
    """Batches of (x, lengths, target)."""
    x = torch.randn(number, steps, 1)
    lengths = torch.randint(5, steps + 1, (number,))
    return DataLoader(TensorDataset(x, lengths, (x[:, 0, 0] > 0).float()), batch_size=64)


if __name__ == "__main__":
    L.seed_everything(0)
    model = SignOfTheFirst()
    trainer = L.Trainer(
        max_epochs=8,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, rows(2048), rows(512))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
