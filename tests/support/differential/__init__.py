"""A random test of fastlora against PEFT: scripts of operations, run on both, compared after each.

`scripts` draws a script from a seed, `bases` has the models, `sides` runs an operation in one
library, `observations` compares the libraries, `exemptions` names the documented differences, and
`oracle` runs a script.
"""
