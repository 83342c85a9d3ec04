"""The prefix tree: each distinct prefix once."""

import pytest
import torch
from hypothesis import given, settings
from small_models import sequences_of_a_tree

from conversation.training.prefix_tree import TokenSequence, build_prefix_tree

pytest_plugins = ["small_models"]
pytestmark = pytest.mark.usefixtures("small_blocks")


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


def test_what_is_no_training_example_is_refused():
    with pytest.raises(ValueError, match="first token"):
        TokenSequence((1, 2), (True, True))
    with pytest.raises(ValueError, match="label marks"):
        TokenSequence((1, 2), (False,))
    with pytest.raises(ValueError, match="none of the examples has a label"):
        build_prefix_tree([TokenSequence((1, 2), (False, False))])
