"""``fastlora serve``: an OpenAI-compatible server for a model and a folder of adapters.

`engine` and the modules that it imports need no web framework; `app` and `protocol` do.
"""
