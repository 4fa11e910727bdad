"""Compiling somebody's schema where it can do no harm: in a process of its own, with little time and memory.

The library bounds what a grammar takes while it is followed but not, for some schemas of a hundred characters, what it
takes to compile: intersections of patterns and large multiples can cost minutes and gigabytes.
"""

import subprocess
import sys
from typing import Final

import llguidance

PARSER_LIMITS: Final = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=10_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""A step at these limits takes some 20 ms of one core."""
CPU_S: Final = 2
MEMORY_BYTES: Final = 1 << 30
_TIMEOUT_S: Final = 15
"""Of the clock, on a machine that does much else."""


def problem_of(grammar: str) -> str | None:
    """What is wrong with a grammar, or None; takes 0.1 s and what compiling takes. TimeoutError: it is not known."""
    try:
        tried = subprocess.run(
            [sys.executable, "-I", __file__],
            input=grammar,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer in {_TIMEOUT_S} s") from error
    if tried.returncode < 0 or "MemoryError" in tried.stderr:  # a limit's signal, or an allocation that failed
        return f"it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB to compile"
    if tried.returncode != 0:
        raise RuntimeError(f"a schema could not be tried: {tried.stderr[-1000:]}")
    return tried.stdout or None


def _try(grammar: str) -> str:
    """What is wrong with a grammar over bytes, found in this process; empty if it compiles and something can begin."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write(_try(sys.stdin.read()))
