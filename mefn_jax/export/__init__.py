"""Exports trained models as folders that others can use: weights, configuration, tokenizer and a card."""
