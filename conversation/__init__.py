"""What the scripts share: one idea per module, imports running one way.

trees, function_calls, examples                 conversations and their text; plain Python, no torch
files, runs, console, machine, publishing       what a run leaves, and how it is kept; no torch either
tokenizer, base_models, adapters, shared_prefix tokens, weights, the loss of one step
training, merging, structural_tests, reporting  the stages
"""
