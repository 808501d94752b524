"""Which solver admits which sampler: each pair works or is refused with its reason; the table is docs/admits.md.

``python tests/test_admits.py`` writes the page anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import parataxis as px
import problems

PAGE = Path(__file__).parent.parent / "docs" / "admits.md"
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
        "# Which solver admits which sampler",
        "",
        "Made by `tests/test_admits.py`. A table *recorded* from a loop has no alpha and sigma. `Speculative` works in",
        "law; the others compute the loop's own sample.",
        "",
        "| solver | " + " | ".join(TABLES) + " |",
        "|---" * (len(TABLES) + 1) + "|",
    ]
    for solver in SOLVERS:
        marks = []
        for name in TABLES:
            refusal = solver.unsupported(local_of(name))
            if refusal is not None and refusal not in reasons:
                reasons.append(refusal)
            marks.append("works" if refusal is None else f"refused ({reasons.index(refusal) + 1})")
        lines.append(f"| `{short(solver)}` | " + " | ".join(marks) + " |")
    lines += ["", *[f"{number}. {reason}" for number, reason in enumerate(reasons, 1)], ""]
    return "\n".join(lines)


def test_the_page_is_what_the_solvers_say():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", list(px.SAMPLERS))
@pytest.mark.parametrize("solver", SOLVERS, ids=short)
def test_a_pair_works_or_is_refused_there_is_no_third_case(solver, name):
    refusal = solver.unsupported(local_of(name))
    if refusal is None:
        result = problems.solve("power law", name, 12, solver, tolerance=1e-6)
        assert result.converged
        return
    with pytest.raises(ValueError, match="does not support this sampler"):
        problems.solve("power law", name, 12, solver)


if __name__ == "__main__":
    PAGE.write_text(page())
