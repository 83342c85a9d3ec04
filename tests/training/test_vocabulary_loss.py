"""The loss over the vocabulary: no tensor of tokens times vocabulary, and no work for a token that is sure."""

import pytest
import torch
from small_models import SHAPE, VOCABULARY, gemma3, sequence, with_adapters
from torch.utils._python_dispatch import TorchDispatchMode

from conversation.training import vocabulary_loss
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
)
from conversation.training.prefix_tree import build_prefix_tree
from conversation.training.shared_prefix import use_shared_prefix_attention

pytest_plugins = ["small_models"]
pytestmark = pytest.mark.usefixtures("small_blocks")


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made while it is active."""

    def __init__(self, model):
        super().__init__()
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.parameters:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return results


def test_no_tensor_of_tokens_times_vocabulary():
    vocabulary = 50 * VOCABULARY
    model = with_adapters(gemma3(vocab_size=vocabulary))
    use_shared_prefix_attention(model)
    sequences = [sequence([1, *range(5, 60)], 1), sequence([1, *range(100, 160)], 1)]
    with LargestTensor(model) as largest:
        backward_in_micro_batches(model, sequences, 1.0, TokenBudget(10**6))
    tokens = build_prefix_tree(sequences).num_tokens
    assert largest.bytes <= 4 * tokens * SHAPE["intermediate_size"] < 4 * tokens * vocabulary / 50


class CountRows(TorchDispatchMode):
    """How many rows are multiplied with a block of the head to form the gradient."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.addmm_.default:
            self.rows += len(args[1])
        elif function is torch.ops.aten.index_add_.default:
            self.rows += len(args[2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("confidence", "least", "most"), [(0.5, 1.0, 1.0), (20.0, 0.05, 0.6), (60.0, 0.0, 0.1)])
def test_a_row_sure_of_its_token_costs_less_and_its_gradient_is_the_same(
    confidence, least, most, dtype, tolerance, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    favourites = torch.randint(0, 4000, (40,), generator=generator)
    hidden = confidence * head[favourites] / head[favourites].norm(dim=1, keepdim=True)
    logits = hidden @ head.T
    labels = torch.randint(0, 4000, (40, 1), generator=generator)  # unlikely ones, so that the shift must rise
    arguments = (tensor.to(dtype) for tensor in (hidden, head))
    with CountRows() as count:
        log_normaliser, mean = vocabulary_loss._softmax_over_vocabulary(
            *arguments, None, logits.gather(1, labels)[:, 0].to(dtype), True
        )
    torch.testing.assert_close(log_normaliser.double(), torch.logsumexp(logits, -1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean.double(), logits.softmax(-1) @ head, rtol=tolerance, atol=tolerance)
    monkeypatch.setattr(vocabulary_loss, "NEGLIGIBLE_ROUNDINGS", 0)
    whole = vocabulary_loss._softmax_over_vocabulary(
        hidden.to(dtype), head.to(dtype), None, logits.gather(1, labels)[:, 0].to(dtype), True
    )
    assert (mean - whole[1]).abs().max() <= 10 * torch.finfo(dtype).eps * head.abs().max()
    blocks = -(-4000 // (9 * 20 * 8 // (40 * dtype.itemsize)))
    assert least <= count.rows / (40 * blocks) <= most
