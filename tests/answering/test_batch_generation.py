"""Answers of many prompts at once are those of each prompt alone, by transformers' `generate`."""

import numpy as np
import pytest
import torch
from small_models import ARCHITECTURES, SHAPE, VOCABULARY, WINDOW
from transformers import GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from conversation.answering import batch_generation, decoding
from conversation.answering.batch_generation import Asked, draw_tokens, generate_batch
from conversation.answering.constrained import Draw
from conversation.answering.decoding import Decoding, generate_answer, generate_answers, generate_with_each
from conversation.answering.token_losses import read_prefix_trees
from conversation.data.questions import THREE_CASES
from conversation.format.calls import Prompt
from conversation.models.tokenizer import load_tokenizer
from conversation.models.weights import load_model
from conversation.training import tree_attention

pytest_plugins = ["small_models"]

PROMPTS = [case.prompt for case in THREE_CASES]
SAMPLED = Decoding("sampled", temperature=3.0)


def small_model(architecture):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = torch.nn.Parameter(torch.randn(VOCABULARY, SHAPE["hidden_size"]), requires_grad=False)
    model.get_output_embeddings().weight = head  # one of its own: with that of the embeddings a token repeats itself
    return model


def random_prompts(number):
    """Prompts of 2 to 40 tokens; most begin alike, and some go on alike for longer."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    common = ids(9)
    longer = common + ids(11)
    lengths = torch.randint(1, 20, (number,), generator=generator).tolist()
    begins = [common, longer, common, [1]]
    return [(1, *begins[i % 4], *ids(length)) for i, length in enumerate(lengths)]


def alone(model, prompts, max_new_tokens):
    """A token that ends answers at many places, and the greedy answers of each prompt alone, by transformers."""
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=VOCABULARY, pad_token_id=0)
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model.generate(input_ids=torch.tensor([prompt]), generation_config=settings)
        answers.append(output[0, len(prompt) :].tolist())

    def ended(end):
        return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]

    def lengths(end):
        return set(map(len, ended(end)))

    end = max(range(VOCABULARY), key=lambda end: (max_new_tokens in lengths(end), len(lengths(end))))
    return end, ended(end)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_each_prompt_alone(architecture, monkeypatch):
    """With fewer rows than prompts, several groups, windows shorter than most prompts and than the answers."""
    monkeypatch.setattr(batch_generation, "PACKED_TOKENS", 70)
    model, prompts = small_model(architecture), random_prompts(9)
    end, expected = alone(model, prompts, 24)
    assert len(set(map(len, expected))) > 2 and max(map(len, expected)) == 24 > 3 * WINDOW, "some end early"
    asked = [*map(Asked, prompts)]
    assert [generate_batch(model, asked, end, 24, rows) for rows in (1, 4, 50)] == [expected] * 3
    monkeypatch.setattr(batch_generation, "CELLS", 3 * 64)  # room for three of the longest rows
    assert generate_batch(model, asked, end, 24, 50) == expected


def test_each_distinct_token_of_the_prompts_is_read_once(monkeypatch):
    read = []
    plain = batch_generation.hidden_states
    monkeypatch.setattr(
        batch_generation, "hidden_states", lambda *given: read.append(given[1].num_tokens) or plain(*given)
    )
    model, prompts = small_model("gemma3"), random_prompts(6)
    generate_batch(model, [Asked(prompt) for prompt in (*prompts, *prompts)], 0, 3, 50)
    distinct = {prompt[: i + 1] for prompt in prompts for i in range(len(prompt) - 1)}
    assert read == [len(distinct)] and len(distinct) < sum(map(len, prompts)) - 30


def test_a_row_that_has_ended_is_computed_no_more():
    model, prompts = small_model("gemma3"), random_prompts(9)
    end, expected = alone(model, prompts, 24)
    read_prefix_trees(model)  # which tries the model on two examples
    rows = []
    hook = model.register_forward_hook(lambda module, args, output: rows.append(output.logits[..., 0].numel()))
    assert generate_batch(model, [*map(Asked, prompts)], end, 24, 4) == expected
    hook.remove()
    assert sum(rows) == sum(map(len, expected)) < 24 * len(prompts) and max(rows) == 4


def test_a_draw_has_the_probabilities_of_transformers_processors(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    for candidates, temperature, top_p in [(300, 0.7, 0.95), (4, 0.7, 0.95), (20, 3.0, 0.5), (300, 1.0, 1.0)]:
        monkeypatch.setattr(batch_generation, "CANDIDATES", candidates)
        logits = 2 * torch.randn(1, 40, generator=generator)
        warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
        expected = warped.softmax(-1)[0].double()
        draws = [Draw(temperature, top_p, np.random.default_rng(i)) for i in range(6000)]
        found = torch.tensor(draw_tokens(logits.expand(6000, -1), draws)).bincount(minlength=40) / 6000
        assert not found[expected == 0].any()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.025)


def test_the_largest_random_number_draws_the_last_token_within_top_p():
    class Largest:
        def random(self):
            return 1 - 2**-53

    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert draw_tokens(logits, [Draw(1.0, 1.0, Largest())]) == [0]
    assert draw_tokens(logits, [Draw(1.0, 0.7, Largest())]) == [3]


# --- through the room of decoding ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder).eval(), load_tokenizer(tiny_folder)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_NEW_TOKENS", 30)


def test_what_is_sampled_depends_on_the_prompt_and_not_on_what_else_is_asked(loaded):
    alone = [generate_answer(*loaded, prompt, SAMPLED) for prompt in PROMPTS]
    assert generate_answers(*loaded, PROMPTS[::-1], SAMPLED) == alone[::-1]
    first, second, other = generate_answers(*loaded, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], SAMPLED)
    assert first == alone[0] != second and other == alone[1]
    assert len(set(map(tuple, alone))) == 3


def test_greedy_and_sampled_answers_together_are_those_of_each(loaded, monkeypatch):
    monkeypatch.setattr(decoding, "_within_the_grammar", lambda model, tokenizer, prompt, how, draw: [7])
    both = generate_with_each(*loaded, PROMPTS, [SAMPLED, decoding.CONSTRAINED, decoding.GREEDY])
    assert both == {how: generate_answers(*loaded, PROMPTS, how) for how in (decoding.GREEDY, SAMPLED)} | {
        decoding.CONSTRAINED: [[7]] * 3
    }


def test_a_base_that_the_shared_step_does_not_know_is_asked_by_transformers(tiny_folder, loaded, monkeypatch):
    expected = generate_answers(*loaded, PROMPTS)
    unknown = load_model(tiny_folder).eval()
    monkeypatch.setattr(
        decoding, "_by_transformers", lambda *given, plain=decoding._by_transformers: calls.append(1) or plain(*given)
    )
    calls = []

    def refuse(model):
        raise ValueError("unknown")

    monkeypatch.setattr("conversation.answering.token_losses.read_prefix_trees", refuse)
    monkeypatch.setattr(decoding, "PROMPTS_AT_A_TIME", 2)
    assert generate_answers(unknown, loaded[1], PROMPTS) == expected
    first, other = (generate_answers(unknown, loaded[1], PROMPTS, Decoding("sampled", 3.0, seed=n)) for n in (0, 1))
    assert first != other and first == generate_answers(unknown, loaded[1], PROMPTS, Decoding("sampled", 3.0))
    assert calls == [1] * 4 and unknown.config._attn_implementation != tree_attention.ATTENTION_NAME


def test_asking_leaves_what_is_trained_of_a_model_as_it_was(tiny_folder):
    model, tokenizer = load_model(tiny_folder).eval(), load_tokenizer(tiny_folder)
    model.requires_grad_(True)
    generate_answer(model, tokenizer, Prompt("Why?"))
    assert model.config._attn_implementation == tree_attention.ATTENTION_NAME
    assert all(weight.requires_grad for weight in model.parameters())
