"""What the scripts share: a folder a floor, one idea a file; a floor imports from those below it.

format      the text that a model is trained on and says: values, rendering, parser, grammar; no torch
data        what a model is trained on and asked: trees, training lines, questions, figures; no torch
runs        what a run leaves behind: folder, record, report, publishing, comparison; no torch
models      tokens and weights: tokenizer, base models, adapters, merging
training    the loss of one step, and the run of all
answering   a model that is asked: decoding, scoring, verdicts, evaluation
"""
