"""Which solver supports which sampler: each pair works or is not supported, with a reason; see docs/supported.md.

``python tests/solvers/test_supported.py`` writes the page anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import parataxis as px
import problems

PAGE = Path(__file__).parents[2] / "docs" / "supported.md"
SOLVERS = [
    px.Sequential(),
    px.Picard(),
    px.Picard(rule="paradigms", entry="copy"),
    px.Anderson(acceleration="none"),
    px.Anderson(),
    px.Anderson(rule="residual"),
    px.Secant(),
    px.CoarseToFine(),
    px.Parareal(pipelined=False),
    px.Parareal(),
    px.Parareal(coarse="two-step"),
    px.Speculative(),
]
TABLES = [*px.SAMPLERS, "recorded"]


def local_of(name):
    if name == "recorded":
        return px.Coefficients.from_dense(problems.sampler("ddim", 12).coefficients.dense()[1])
    return problems.sampler(name, 12).coefficients


def short(solver):
    """Return the solver with the options that differ from its defaults."""
    changed = {
        name: value for name, value in vars(solver).items() if value != type(solver).__dataclass_fields__[name].default
    }
    return f"{type(solver).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def page():
    """Return the page: a mark for each pair, and the reasons below."""
    reasons = []
    lines = [
        "# Which solver supports which sampler",
        "",
        "Made by `tests/solvers/test_supported.py`. A recurrence *recorded* from a loop has no alpha and sigma.",
        "`Speculative` is exact in distribution; the others compute the sample of the sequential loop.",
        "",
        "| solver | " + " | ".join(TABLES) + " |",
        "|---" * (len(TABLES) + 1) + "|",
    ]
    for solver in SOLVERS:
        marks = []
        for name in TABLES:
            reason = solver.unsupported(local_of(name))
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            marks.append("works" if reason is None else f"not supported ({reasons.index(reason) + 1})")
        lines.append(f"| `{short(solver)}` | " + " | ".join(marks) + " |")
    lines += ["", *[f"{number}. {reason}" for number, reason in enumerate(reasons, 1)], ""]
    return "\n".join(lines)


def test_page_is_what_the_solvers_say():
    """The page is what the solvers say."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", list(px.SAMPLERS))
@pytest.mark.parametrize("solver", SOLVERS, ids=short)
def test_solver_and_sampler_work_or_are_not_supported(solver, name):
    reason = solver.unsupported(local_of(name))
    if reason is None:
        result = problems.solve("power law", name, 12, solver, tolerance=1e-6)
        assert result.converged
        return
    with pytest.raises(ValueError, match="does not support this sampler"):
        problems.solve("power law", name, 12, solver)


if __name__ == "__main__":
    PAGE.write_text(page())
