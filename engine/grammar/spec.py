"""GrammarSpec: what the whole output of a request must be. Plain data; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import InvalidRequest

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_GRAMMAR_BYTES = 2**17  # of its text, in UTF-8
MAX_CHOICES = 2048


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One constraint of one request.

    `text`, by kind: json_object: ""; json_schema: the schema, as JSON, whose order of properties is the answer's;
    regex: a regular expression that matches the answer as a whole (Rust's syntax, without looking around); choice: a
    JSON list of strings; grammar: Lark, or GBNF (with "::="); structural_tag: JSON, see `engine.grammar.tags`.
    Whether it can be followed is found when it is compiled. Raises: InvalidRequest for a text that is too long.
    """

    kind: Kind
    text: str = ""
    field: str = "structured_outputs"  # of the body that it came in: errors name it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(self.field, f"{self.kind!r} is no kind of grammar; known are {', '.join(KINDS)}")
        num_bytes = len(self.text.encode(errors="replace"))
        if num_bytes > MAX_GRAMMAR_BYTES:
            limit = f"{num_bytes} bytes, the limit is {MAX_GRAMMAR_BYTES}"
            raise InvalidRequest(self.field, f"a {self.kind} of {limit}; send a shorter one")
