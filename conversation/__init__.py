"""What the scripts share: one idea per module, imports running one way.

trees, function_calls, examples, runs           plain Python, no torch
tokenizer, base_models, shared_prefix           tokens, weights, the loss of one step
training, merging, structural_tests, reporting  the stages
"""
