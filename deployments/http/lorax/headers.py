"""LoRAX's headers: what a request cost, in tokens and in whole milliseconds, and what answered it."""

from __future__ import annotations

import time

from deployments.asks import Ask
from deployments.http.collect import Usage
from deployments.router.gateway import Gateway, Opened


def of_any(gateway: Gateway, ask: Ask, inputs: str, opened: Opened) -> dict[str, str]:
    """Of every answer: what is known when it begins."""
    told = {
        "x-compute-type": "gpu" if gateway.device == "cuda" else gateway.device,
        "x-compute-characters": str(len(inputs)),
        "x-model-id": gateway.model_id,
        "x-request-id": opened.request_id,
        "x-prompt-tokens": str(sum(map(len, opened.prompts))),
    }
    names = [part.name for part in ask.parts] or [ask.adapter or ""]
    if any(names):
        told["x-adapter-id"] = ",".join(names)
    source = ask.parts[0].source if ask.parts else ask.adapter_source
    return told if source is None else told | {"x-adapter-source": source}


def of_whole(opened: Opened, began_s: float, usage: Usage) -> dict[str, str]:
    """Of an answer that is sent whole, now. `began_s`: when its request had come, on the monotonic clock."""
    now_s = time.monotonic()
    num_tokens = max(1, usage.completion_tokens)
    queue_s = usage.queue_s
    inference_s = max(0.0, now_s - opened.sent_s - queue_s)
    rest_s = max(0.0, now_s - opened.first_s)
    return {
        "x-generated-tokens": str(usage.completion_tokens),
        "x-skipped-tokens": "0",  # guesses are not made for these paths
        "x-total-tokens": str(usage.prompt_tokens + usage.completion_tokens),
        "x-compute-time": _ms(now_s - began_s),
        "x-total-time": _ms(now_s - began_s),
        "x-validation-time": _ms(opened.sent_s - began_s),
        "x-queue-time": _ms(queue_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / num_tokens),
        "x-time-to-first-token": _ms(opened.first_s - began_s),
        "x-time-per-output-token": _ms(rest_s / max(1, num_tokens - 1)),
    }


def _ms(seconds: float) -> str:
    return str(round(1000 * seconds))
