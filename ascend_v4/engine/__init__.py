"""From requests to tokens: scheduling, sampling, text, and the loop that joins them.

Owns what happens between a prompt's ids and the text that goes back. Knows neither HTTP nor the model: the
model is behind `protocol.Runner`.
"""
