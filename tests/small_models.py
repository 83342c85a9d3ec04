"""Small models of several architectures, prepared for training and untouched, and the plain computation of their loss.

A pytest plug-in that the tests of the training step load.
"""

import copy

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conversation.models.adapters import FusedLoraLinear
from conversation.training import prefix_tree, vocabulary_loss
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
)
from conversation.training.prefix_tree import TokenSequence
from conversation.training.shared_prefix import use_shared_prefix_attention

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

            def normed(x, gain=gain, eps=eps):
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain.to(x.device)

            module.forward = normed
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
        for device in ("CPU", "GPU"):
            patch.setattr(vocabulary_loss, f"{device}_HEAD_BLOCK_BYTES", 9 * 20 * 8)
        yield
    torch.set_num_threads(threads)


def adapter_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def plain_loss_and_gradients(model, sequences, cross_entropy=torch.nn.functional.cross_entropy):
    model.zero_grad()
    loss_sum = 0.0
    for sequence in sequences:
        ids, labelled = (torch.tensor(each, device=model.device) for each in (sequence.ids, sequence.is_label[1:]))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = cross_entropy(logits[:-1][labelled], ids[1:][labelled], reduction="sum")
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


def fails_in_the_backward_pass_once(shared):
    """Out of memory when the later layers' gradients are there already, and the earlier ones' are not."""
    failures = []

    def fail(gradient):
        if not failures:
            failures.append(1)
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    shared.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.register_hook(fail)
    return failures
