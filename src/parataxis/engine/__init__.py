"""The engine: carries out what solvers ask, in few calls of the network."""
