"""A random test of fastlora against PEFT: scripts of operations, run on both, compared after each.

`scripts` draws a script from a seed, `bases` has the models, `sides` runs an operation in one
library, `observations` compares the libraries, and `oracle` runs a script. A `meeting` is a
difference and what is known of the model there. `exemptions` names the documented differences;
`base_biases` has the rules of which base biases train.
"""
