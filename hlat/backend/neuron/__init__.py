"""What a Neuron machine needs around a run: tested releases, environment variables, compiler flags.

Nothing here imports torch or a Neuron package, so it can run before them, which is when variables count.
"""
