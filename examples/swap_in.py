"""Replace the GRUs of an existing model: same outputs, same checkpoint.

Run it with `python examples/swap_in.py`.
"""

import torch
from torch import nn

from triton_gru import replace_gru


class Tagger(nn.Module):
    """A label for each token of a sentence, with torch's own GRU."""

    def __init__(self, words: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 32)
        self.gru = nn.GRU(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.output = nn.Linear(2 * 64, labels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [batch, tokens, labels] of tokens [batch, tokens]."""
        y, _ = self.gru(self.embedding(tokens))
        return self.output(y)


torch.manual_seed(0)
model = Tagger(words=1000, labels=10)
tokens = torch.randint(1000, (8, 20))
before = model(tokens)
checkpoint = model.state_dict()

swapped = replace_gru(model)
print(swapped)
for name, reason in swapped.explain().items():
    print(f"{name}: {reason}")

print(f"largest difference: {(model(tokens) - before).abs().max():.1e}")
model.load_state_dict(checkpoint)  # names and shapes of the parameters are unchanged
Tagger(words=1000, labels=10).load_state_dict(model.state_dict())  # and vice versa
