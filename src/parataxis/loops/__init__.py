"""Somebody else's loop, unmodified: recorded, solved and replayed.

To read in this order: ``solver`` goes through the phases; ``record``, ``evaluate``, ``equation`` and ``refinement``
are one phase each. They share

- the calls: ``calls``, ``rows`` (which rows are states), ``batch``, ``layout`` and ``merger`` (many calls in one);
- the passes: ``runner`` runs the loop, ``stubs`` stand in for its networks, ``stage_plan`` and ``answers`` say what
  they answer, ``passes`` is what was seen;
- what is known: ``structure`` (``analysis``, ``fit``), ``known_outputs``, ``error_estimate``;
- what must not change: ``purity``, ``memo``, ``module_state``, ``randomness``, and ``world``, all that a loop reaches.

Another way to use a loop, such as solving it lazily within a single pass, needs another ``solver`` and can share the
rest.
"""
