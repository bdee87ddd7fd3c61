"""Attention of visual tokens on their neighbours, one module a form; `dispatch` chooses, `reference` is the oracle."""
