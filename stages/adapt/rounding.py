"""Parameters that are stored in bfloat16, trained with float32 gradients and moments.

The records update their bfloat16 tables in bfloat16 throughout, without a master copy. Their gradients then depend on
how many processes the rows are spread over. Here only the weight itself is rounded after every step, which is what
makes most updates of those tables vanish, in the records and here.
"""

import torch

from model.gpt import GPT


class RoundedWeights:
    """The bfloat16 parameters of a model, from now on float32 tensors that hold bfloat16 values."""

    def __init__(self, model: GPT) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def round(self) -> None:
        """Bring them back to bfloat16 values, after a step."""
        for parameter in self.parameters:
            parameter.copy_(parameter.bfloat16())

    def store(self) -> None:
        """Store them as bfloat16 again."""
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()
