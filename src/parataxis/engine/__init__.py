"""The engine: evaluates what solvers query, in few calls of the network, for all samples at once."""
