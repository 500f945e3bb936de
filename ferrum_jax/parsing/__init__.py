"""From the text of an answer to reasoning, content and calls of functions, while it arrives.

`Dialect` says how a model writes them, and `Parser` gives the events of one answer. `formats` has the ways of writing calls,
each as a generator over a `Reader`, which hides that the text arrives in pieces.
"""

from ferrum_jax.parsing.dialect import CALL_NAMES, REASONING_NAMES, Dialect
from ferrum_jax.parsing.events import Answer, Arguments, Call, Called, CallEnd, Content, Event, Reasoning
from ferrum_jax.parsing.parser import Parser
from ferrum_jax.parsing.tools import Tools

__all__ = [
    "CALL_NAMES",
    "REASONING_NAMES",
    "Answer",
    "Arguments",
    "Call",
    "CallEnd",
    "Called",
    "Content",
    "Dialect",
    "Event",
    "Parser",
    "Reasoning",
    "Tools",
]
