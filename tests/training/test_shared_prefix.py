"""The shared-prefix step against the plain computation: one example at a time, full logits, torch's cross entropy."""

import random

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from peft import get_peft_model
from small_models import (
    SHAPE,
    adapter_gradients,
    fails_in_the_backward_pass_once,
    largest_difference,
    llama,
    make_pair,
    plain_loss_and_gradients,
    sequence,
    sequences_of_a_tree,
    shared_loss_and_gradients,
)
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from conversation.models.adapters import add_adapters, lora_config
from conversation.models.tokenizer import encode_example, load_tokenizer
from conversation.models.weights import load_model
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    measure_token_budget,
)
from conversation.training.prefix_tree import build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss, use_shared_prefix_attention
from conversation_config import TrainingConfig

pytest_plugins = ["small_models"]
pytestmark = pytest.mark.usefixtures("small_blocks")


@settings(max_examples=60, deadline=None)
@given(sequences=sequences_of_a_tree())
def test_loss_and_every_gradient_are_those_of_the_plain_computation(pair, sequences):
    shared, plain = pair
    difference = largest_difference(
        shared_loss_and_gradients(shared, sequences), plain_loss_and_gradients(plain, sequences)
    )
    assert difference < 1e-10


def test_evaluation_without_gradient_gives_the_same_loss(gemma_pair):
    shared, plain = gemma_pair
    sequences = [sequence([1, *range(5, 25)], 3), sequence([1, *range(5, 15), *range(30, 40)], 12)]
    with torch.no_grad():
        loss = shared_prefix_loss(shared, build_prefix_tree(sequences))
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain_loss_and_gradients(plain, sequences)[0], rel=1e-10)


def test_examples_that_are_equal_share_their_dropout_masks():
    shared, _ = make_pair(dropout=0.3)
    shared.train()
    example = sequence([1, *range(5, 25)], 8)
    torch.manual_seed(1)
    once, once_gradients = shared_loss_and_gradients(shared, [example])
    torch.manual_seed(1)
    twice, twice_gradients = shared_loss_and_gradients(shared, [example, example])
    torch.manual_seed(2)
    other, _ = shared_loss_and_gradients(shared, [example])
    assert twice == pytest.approx(2 * once, rel=1e-12)
    for name, gradient in once_gradients.items():
        torch.testing.assert_close(twice_gradients[name], 2 * gradient)
    assert other != pytest.approx(once, rel=1e-6)


def test_without_a_tree_the_model_is_the_plain_model(pair):
    shared, plain = (model.eval() for model in pair)
    ids = torch.tensor([[0, 0, 1, *range(5, 20)], [1, *range(30, 47)]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, theirs = (model(ids, attention_mask=mask, position_ids=positions).logits for model in (shared, plain))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=0)
    ours, theirs = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for model in (shared, plain)
    )
    assert torch.equal(ours, theirs)


def trainable_head():
    model = llama()
    model.lm_head.weight.requires_grad_(True)
    return model


def scaled_logits():
    return CohereForCausalLM(CohereConfig(**SHAPE, num_key_value_heads=4, logit_scale=0.5)).requires_grad_(False)


def capped_attention():
    config = {"num_key_value_heads": 2, "head_dim": 6, "attn_logit_softcapping": 50.0}
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE | config)).requires_grad_(False)


def attention_dropout():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1)).requires_grad_(False)


REFUSED = [
    (trainable_head, "frozen"),
    (scaled_logits, "plain loss"),
    (capped_attention, "softcap"),
    (attention_dropout, "attention dropout"),
]


@pytest.mark.parametrize(
    "make, reason",
    REFUSED,
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_with_another_loss_are_refused(make, reason):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=reason):
        use_shared_prefix_attention(model)


def test_the_check_of_a_model_draws_no_random_numbers_of_the_run_and_leaves_its_mode():
    model = add_adapters(llama(), TrainingConfig(lora_r=2, lora_dropout=0.3)).eval()
    before = torch.random.get_rng_state()
    use_shared_prefix_attention(model)
    assert torch.equal(before, torch.random.get_rng_state()) and not model.training


def test_a_model_that_was_not_prepared_is_refused(gemma_pair):
    with pytest.raises(ValueError, match="use_shared_prefix_attention"):
        shared_prefix_loss(gemma_pair[1], build_prefix_tree([sequence([1, 2, 3], 1)]))


DDP_SEQUENCES = [sequence([1, *range(5, 5 + n), *range(20 + n, 40)], 4 + n) for n in range(6)]


# Another number of examples, labels and micro-batches in each process; in the second step one has none at all.
DDP_PARTS = [[DDP_SEQUENCES[:4], DDP_SEQUENCES], [DDP_SEQUENCES[4:], []]]


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared, _ = make_pair()
    model = torch.nn.parallel.DistributedDataParallel(shared, find_unused_parameters=True)  # as the Trainer does
    budget = measure_token_budget(model)
    assert budget.tokens > 1000
    num_labels = sum(sum(s.is_label) for s in DDP_SEQUENCES)
    failures = fails_in_the_backward_pass_once(shared) if rank == 1 else [1]
    for step, part in enumerate(DDP_PARTS[rank]):
        model.zero_grad()
        backward_in_micro_batches(model, part, 2 / num_labels, TokenBudget(40))
        torch.save(adapter_gradients(shared), f"{folder}/{step}-{rank}.pt")
    assert failures
    torch.distributed.barrier()  # a process that leaves early would take the other's last messages with it
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_though_one_runs_out_of_memory(gemma_pair, tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    shared, _ = gemma_pair
    shared.zero_grad()
    num_labels = sum(sum(s.is_label) for s in DDP_SEQUENCES)
    backward_in_micro_batches(shared, DDP_SEQUENCES, 1 / num_labels, TokenBudget(10**6))
    for step in range(2):
        first, second = (torch.load(tmp_path / f"{step}-{rank}.pt") for rank in range(2))
        for name, gradient in adapter_gradients(shared).items():
            torch.testing.assert_close(first[name], gradient, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)


def exact_cross_entropy(logits, labels, reduction):
    """torch's own loses some of the normaliser over 262,144 entries in FP32 on a CPU; logsumexp does not."""
    return (torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0]).sum()


@pytest.mark.standin
@pytest.mark.parametrize(
    ("cross_entropy", "tolerance"),
    [
        (exact_cross_entropy, 2e-5),
        pytest.param(torch.nn.functional.cross_entropy, 5e-4, marks=pytest.mark.slow),
    ],
)
def test_float32_on_the_stand_in(standin_folder, own_examples, cross_entropy, tolerance):
    tokenizer = load_tokenizer(standin_folder)
    examples = [encode_example(tokenizer, example) for example in random.Random(0).sample(own_examples, 8)]
    sequences = [sequence(example.ids, example.num_prompt_tokens) for example in examples]
    plain = get_peft_model(load_model(standin_folder), lora_config(TrainingConfig(lora_dropout=0.0)))
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    plain.get_base_model().set_attn_implementation("sdpa")
    expected = plain_loss_and_gradients(plain, sequences, cross_entropy)
    trained = add_adapters(load_model(standin_folder), TrainingConfig(lora_dropout=0.0))
    trained.load_state_dict(plain.state_dict())
    use_shared_prefix_attention(trained)
    ours = shared_loss_and_gradients(trained, sequences)
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    difference = sum((ours[1][name] - expected[1][name]).double().pow(2).sum() for name in ours[1]) ** 0.5
    norm = sum(gradient.double().pow(2).sum() for gradient in expected[1].values()) ** 0.5
    assert difference / norm < tolerance
