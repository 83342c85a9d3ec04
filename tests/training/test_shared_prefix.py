"""The shared-prefix step against the plain computation: one example at a time, full logits, torch's cross entropy."""

import copy
import random
import weakref

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conversation.models.adapters import FusedLoraLinear, add_adapters, lora_config
from conversation.models.tokenizer import encode_example, load_tokenizer
from conversation.models.weights import load_model
from conversation.training import micro_batches, prefix_tree, vocabulary_loss
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    measure_token_budget,
    split_into_micro_batches,
)
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss, use_shared_prefix_attention
from conversation_config import TrainingConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 61
WINDOW = 7  # shorter than most of the sequences below
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma3(**changes):
    config = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    config |= {"sliding_window": WINDOW, "layer_types": LAYER_TYPES}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | config | changes))


def qwen2():
    config = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": WINDOW}
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE | config | {"layer_types": LAYER_TYPES}))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 4, "tie_word_embeddings": True}))


ARCHITECTURES = {
    "gemma3": gemma3,
    "gemma3 with capped logits": lambda: gemma3(final_logit_softcapping=2.0),
    "qwen2": qwen2,
    "llama": llama,
}


def with_adapters(base, dropout=0.0, fused=False):
    """LoRA on all projections, both factors random, so that every adapter has a gradient."""
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=PROJECTIONS, init_lora_weights=False)
    if fused:
        lora._register_custom_module({torch.nn.Linear: FusedLoraLinear})
    return get_peft_model(base, lora)


def in_float64(model):
    """Norms and rotary tables of transformers go through float32 whatever the model's type; not what is tested here."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
            eps = getattr(module, "eps", None) or module.variance_epsilon
            module.forward = lambda x, gain=gain, eps=eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain
    return model


def make_pair(architecture="gemma3", dropout=0.0):
    """(prepared for training as we do it, untouched and with peft's own layers), with equal weights."""
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture]()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shared = with_adapters(copy.deepcopy(base), dropout, fused=True)
    plain = with_adapters(base, dropout)
    plain.load_state_dict(shared.state_dict())
    plain.get_base_model().set_attn_implementation("sdpa")
    use_shared_prefix_attention(shared)
    return in_float64(shared), in_float64(plain)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    return make_pair(request.param)


@pytest.fixture(scope="module")
def gemma_pair():
    return make_pair()


@pytest.fixture(autouse=True)
def small_blocks(request):
    """Tiny models have tiny tensors: with blocks to match, several tiles and blocks take part. One thread is best."""
    if request.node.get_closest_marker("standin"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "TILE_TOKENS", 5)
        patch.setattr(vocabulary_loss, "HEAD_BLOCK_ROWS", 9)
        patch.setattr(vocabulary_loss, "CPU_HEAD_BLOCK_BYTES", 9 * 20 * 8)
        yield
    torch.set_num_threads(threads)


def adapter_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def plain_loss_and_gradients(model, sequences, cross_entropy=torch.nn.functional.cross_entropy):
    model.zero_grad()
    loss_sum = 0.0
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0]
        labelled = torch.tensor(sequence.is_label)[1:]
        loss = cross_entropy(logits[:-1][labelled], torch.tensor(sequence.ids)[1:][labelled], reduction="sum")
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, adapter_gradients(model)


def shared_loss_and_gradients(model, sequences, tokens=10**6):
    model.zero_grad()
    loss_sum = backward_in_micro_batches(model, sequences, 1.0, TokenBudget(tokens))
    return loss_sum.item(), adapter_gradients(model)


def largest_difference(ours, theirs):
    """The largest relative error of the loss and of any adapter's gradient."""
    assert ours[1].keys() == theirs[1].keys()
    scale = max(gradient.norm() for gradient in theirs[1].values())
    errors = [((ours[1][name] - theirs[1][name]).norm() / (theirs[1][name].norm() + 1e-6 * scale)) for name in ours[1]]
    return max(abs(ours[0] - theirs[0]) / theirs[0], *(error.item() for error in errors))


def sequence(ids, first_label):
    return TokenSequence(tuple(ids), tuple(i >= first_label for i in range(len(ids))))


# Two tokens make shared prefixes, prefixes of one another and duplicates; many tokens make batches that share nothing.
token_lists = st.one_of(
    st.lists(st.integers(3, 4), min_size=2, max_size=24),
    st.lists(st.integers(3, VOCABULARY - 1), min_size=2, max_size=24),
)


@st.composite
def sequences_of_a_tree(draw):
    trunk = draw(st.lists(st.integers(3, VOCABULARY - 1), max_size=20))
    sequences = []
    for branch in draw(st.lists(token_lists, min_size=1, max_size=5)):
        ids = [1, *trunk[: draw(st.integers(0, len(trunk)))], *branch]
        if draw(st.booleans()):  # labels on a completion, or on all tokens
            sequences.append(sequence(ids, first_label=len(ids) - draw(st.integers(1, len(branch)))))
        else:
            sequences.append(sequence(ids, first_label=1))
    duplicates = draw(st.lists(st.sampled_from(sequences), max_size=2))
    return draw(st.permutations(sequences + duplicates))


# ----------------------------------------------------------------------------------------------------------------------
# The same loss and the same gradients
# ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sequences=sequences_of_a_tree())
def test_loss_and_every_gradient_are_those_of_the_plain_computation(pair, sequences):
    shared, plain = pair
    difference = largest_difference(
        shared_loss_and_gradients(shared, sequences), plain_loss_and_gradients(plain, sequences)
    )
    assert difference < 1e-10


@settings(max_examples=30, deadline=None)
@given(sequences=sequences_of_a_tree(), tokens=st.integers(1, 60))
def test_micro_batches_and_checkpointing_change_nothing(gemma_pair, sequences, tokens):
    shared, plain = gemma_pair
    shared.train()
    ours = shared_loss_and_gradients(shared, sequences, tokens)
    assert largest_difference(ours, plain_loss_and_gradients(plain, sequences)) < 1e-10
    assert not shared.get_base_model().is_activation_checkpointing


def test_an_example_longer_than_the_budget_keeps_only_its_layers_inputs_and_the_same_masks():
    shared, _ = make_pair(dropout=0.3)
    shared.train()
    example = sequence([1, *range(5, 25)], 4)
    embedding = shared.get_base_model().get_input_embeddings()
    layer_runs, first_layer_gradients = [], []
    for layer in shared.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: layer_runs.append(module))
    embedding.register_forward_hook(lambda module, args, output: first_layer_gradients.append(output.requires_grad))
    gradients = []
    for tokens in (100, 19, 100):  # the example has 20 inputs
        torch.manual_seed(3)
        gradients.append(shared_loss_and_gradients(shared, [example], tokens)[1])
    assert len(layer_runs) == 3 + 2 * 3 + 3  # forwards only; forwards and again on the way back; forwards only
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=0)
    assert first_layer_gradients == [False] * 3 and len(embedding._forward_hooks) == 1  # the one of this test


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


# ----------------------------------------------------------------------------------------------------------------------
# The structure
# ----------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sequences=sequences_of_a_tree())
def test_a_tree_holds_each_distinct_prefix_once(sequences):
    tree = build_prefix_tree(sequences)
    prefixes = {s.ids[:end] for s in sequences for end in range(1, len(s.ids))}
    assert tree.num_tokens == len(prefixes)
    assert tree.num_labels == sum(sum(s.is_label) for s in sequences)
    assert tree.num_sequence_tokens == sum(len(s.ids) for s in sequences)
    shuffled = build_prefix_tree(sequences[::-1])
    assert torch.equal(tree.input_ids, shuffled.input_ids)


@given(sequences=sequences_of_a_tree(), tokens=st.integers(1, 80))
def test_micro_batches_hold_every_example_and_fit(sequences, tokens):
    groups = split_into_micro_batches(sequences, tokens)
    assert sorted(s.ids for group in groups for s in group) == sorted(s.ids for s in sequences)
    for group in groups:
        assert build_prefix_tree(group).num_tokens <= max(tokens, max(len(s.inputs) for s in group))
        assert len({s.inputs for s in group}) == 1 or build_prefix_tree(group).num_tokens <= tokens


def test_what_is_no_training_example_is_refused():
    with pytest.raises(ValueError, match="first token"):
        TokenSequence((1, 2), (True, True))
    with pytest.raises(ValueError, match="label marks"):
        TokenSequence((1, 2), (False,))
    with pytest.raises(ValueError, match="none of the examples has a label"):
        build_prefix_tree([TokenSequence((1, 2), (False, False))])


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


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


def test_a_step_that_runs_out_of_memory_starts_again_in_smaller_parts(monkeypatch):
    shared, _ = make_pair(dropout=0.3)
    shared.train()
    sequences = [sequence([1, *range(start, start + 20)], 4) for start in (5, 15, 25, 35)]

    torch.manual_seed(5)
    shared.zero_grad()
    backward_in_micro_batches(shared, sequences[:1], 1.0, TokenBudget(100))  # gradients the step must not lose
    backward_in_micro_batches(shared, sequences, 0.1, TokenBudget(25))
    expected = adapter_gradients(shared)

    calls, last_losses = [], []

    def fails_twice(model, tree):
        calls.append(tree.num_tokens)
        assert all(loss() is None for loss in last_losses)  # nothing refers to what failed
        loss = shared_prefix_loss(model, tree)
        if len(calls) in (2, 4):  # at the first micro-batch of the second step, and at a later one
            last_losses.append(weakref.ref(loss))
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return loss

    monkeypatch.setattr(micro_batches, "shared_prefix_loss", fails_twice)
    torch.manual_seed(5)
    shared.zero_grad()
    budget = TokenBudget(100)
    backward_in_micro_batches(shared, sequences[:1], 1.0, budget)
    backward_in_micro_batches(shared, sequences, 0.1, budget)
    assert calls == [20, 77, 20, 20, 20, 20, 20, 20]  # the first step; all together; two alone; each alone
    assert budget.tokens == 77 // 2 // 2 and len(split_into_micro_batches(sequences, budget.tokens)) == 4
    for name, gradient in adapter_gradients(shared).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def fails_in_the_backward_pass_once(shared):
    """Out of memory when the later layers' gradients are there already, and the earlier ones' are not."""
    failures = []

    def fail(gradient):
        if not failures:
            failures.append(1)
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    shared.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.register_hook(fail)
    return failures


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_half_of_it():
    shared, _ = make_pair()
    sequences = [sequence([1, *range(start, start + 20)], 4) for start in (5, 15, 25, 35)]
    _, expected = shared_loss_and_gradients(shared, sequences)
    failures = fails_in_the_backward_pass_once(shared)
    _, gradients = shared_loss_and_gradients(shared, sequences)
    assert failures
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_the_free_memory_of_a_gpu_counts_its_cache_and_stops_at_the_cap(monkeypatch):
    fraction = []
    for name, value in {"mem_get_info": (3000, 10_000), "memory_reserved": 2000, "memory_allocated": 500}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction[-1])
    for fraction[:], free in (([1.0], 3000 + 1500), ([0.4], 4000 - 500)):
        assert micro_batches.free_bytes(torch.device("cuda", 0)) == free


def test_memory_that_never_suffices_is_an_error(gemma_pair, monkeypatch):
    def fails(model, tree):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(micro_batches, "shared_prefix_loss", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        backward_in_micro_batches(gemma_pair[0], [sequence(range(1, 20), 3)], 1.0, TokenBudget(100))


def test_the_budget_follows_the_free_memory(gemma_pair, monkeypatch):
    budgets = []
    for free in (2**26, 2**27):
        monkeypatch.setattr(micro_batches, "free_bytes", lambda device, free=free: free)
        state = torch.get_rng_state()
        budgets.append(measure_token_budget(gemma_pair[0]).tokens)
        assert torch.equal(torch.get_rng_state(), state)
    assert budgets[1] == pytest.approx(2 * budgets[0], abs=1)
    # per token and layer at least the inputs of seven projections, in float64
    saved = micro_batches.MEMORY_SHARE * 2**26 / budgets[0]
    assert saved > 3 * 8 * (4 * 24 + 2 * 32 + 40)


def test_the_budget_counts_what_dropout_keeps_whatever_mode_the_model_is_in(monkeypatch):
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: 2**26)
    shared, _ = make_pair(dropout=0.3)
    measured = [measure_token_budget(shared.train(mode)).tokens for mode in (True, False)]
    assert measured[0] == measured[1] < measure_token_budget(make_pair()[0]).tokens
    assert not shared.training


# ----------------------------------------------------------------------------------------------------------------------
# Other uses of the model, and models it cannot serve
# ----------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "make, reason",
    [(trainable_head, "frozen"), (scaled_logits, "plain loss"), (capped_attention, "softcap")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_with_another_loss_are_refused(make, reason):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=reason):
        use_shared_prefix_attention(model)


def test_a_model_that_was_not_prepared_is_refused(gemma_pair):
    with pytest.raises(ValueError, match="use_shared_prefix_attention"):
        shared_prefix_loss(gemma_pair[1], build_prefix_tree([sequence([1, 2, 3], 1)]))


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------------------
# The real model
# ----------------------------------------------------------------------------------------------------------------------


def exact_cross_entropy(logits, labels, reduction):
    """torch's own loses some of the normaliser over 262,144 entries in FP32 on a CPU; logsumexp does not."""
    return (torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0]).sum()


@pytest.mark.standin
@pytest.mark.parametrize(
    ("cross_entropy", "tolerance"), [(exact_cross_entropy, 2e-5), (torch.nn.functional.cross_entropy, 5e-4)]
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
