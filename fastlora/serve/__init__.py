"""``fastlora serve``: an OpenAI-compatible server for a model and a folder of adapters.

`engine` and what it imports need no web framework; `app` and `protocol` do.
"""
