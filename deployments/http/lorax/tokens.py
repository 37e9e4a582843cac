"""Tokens of a text as LoRAX's POST /tokenize tells them."""

from __future__ import annotations

from typing import Any

from deployments.router.prompts import Prompts


async def tokens(prompts: Prompts, inputs: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
    """Of each token its id, the vocabulary's word for it, and where in `inputs` it stands, in characters.

    Raises: InvalidRequest, Refused, naming `inputs`.
    """
    pieces = await prompts.pieces(inputs, add_special_tokens, "inputs")
    return [{"id": i, "text": word, "start": start, "stop": stop} for i, word, start, stop in pieces]
