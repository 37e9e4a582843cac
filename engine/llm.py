"""Offline generation: prompts in, outputs back, in order. No server, no threads, no Ray.

This is a composition root: it alone in the engine packs adapters, with `adapter_store.image.packing`; a server gets its
images from the adapter store.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.checkpoint.generation import GenerationConfig, sampling_defaults
from engine.checkpoint.pooling import pooling_defaults
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import AdapterError, RequestFailed
from engine.model_folder import locate
from engine.offline import EmbeddingOutput, GenerationOutput, Job, Prompt, listed, per_prompt
from engine.output import OutputProcessor
from engine.pooling import NextToken, Numbers, Pool, PoolingDefaults, PromptScores, PromptToken, prompt_tokens
from engine.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from engine.lora.image import AdapterImage
    from engine.stats import EngineStats, RequestMetrics

logger = logging.getLogger(__name__)


_NO_SAMPLES = SamplingParams(max_tokens=1)  # of requests for vectors


class LLM:
    """A base model and its adapters. Not thread-safe: use `AsyncEngine` for concurrent callers.

    >>> llm = LLM("demo/base", adapters={"upper": "demo/adapters/upper"})  # doctest: +SKIP
    >>> llm.generate("hello\\n", SamplingParams(max_tokens=8), adapters="upper")[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        generation_config: GenerationConfig = "auto",
        **settings: Any,
    ) -> None:
        """`settings` are fields of `EngineConfig`. `generation_config`: whether the model's file of that name gives the
        defaults of sampling.

        Raises: TypeError for a setting that does not exist; ConfigError, ModelNotSupported; AdapterError.
        """
        self._defaults = sampling_defaults(os.fspath(model), generation_config, logger)
        self._engine = Engine(EngineConfig(model=os.fspath(model), **_known(settings)))
        self._outputs = OutputProcessor(self._engine.tokenizer)
        self._images: dict[str, AdapterImage] = {}
        self._request_ids = count()
        for name, path in (adapters or {}).items():
            self.add_adapter(name, path)

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Make the PEFT adapter in folder `path` available under `name`; a name given before now means this one.

        Raises: AdapterError when the folder holds no adapter that fits this model.
        """
        self._images[name] = _pack(name, Path(path), self._engine)

    @cached_property
    def _pooling(self) -> PoolingDefaults:
        return pooling_defaults(locate(self._engine.config.model))

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._images)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """How tokens are chosen when `generate` is told nothing, but for `changes`: fields of `SamplingParams`.

        >>> llm.default_sampling_params(max_tokens=256)  # doctest: +SKIP
        """
        return SamplingParams(**{**self._defaults, **changes})

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[GenerationOutput]:
        """Continue every prompt; the outputs are in the order of the prompts.

        A prompt is text or a list of token ids. `params` and `adapters` are one for all or one per prompt; an adapter
        is a name, None is the base model. Without `params`: `default_sampling_params()`.

        Raises: InvalidRequest, PromptTooLong, AdapterError before anything runs. What fails while running is an output
        with `finish_reason` ERROR and `error` set.
        """
        prompt_list = listed(prompts)
        jobs = [
            self._job(prompt, one_params, adapter)
            for prompt, one_params, adapter in zip(
                prompt_list,
                per_prompt(
                    "params",
                    self.default_sampling_params() if params is None else params,
                    len(prompt_list),
                    SamplingParams,
                ),
                per_prompt("adapters", adapters, len(prompt_list), str | None),
                strict=True,
            )
        ]
        metrics = self._run(jobs, use_tqdm)
        return [job.output(metrics[job.request.request_id]) for job in jobs]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        adapters: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
        *,
        pool: Pool | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> list[EmbeddingOutput]:
        """The vector of every prompt, in their order. What is not said, the model's folder says, else: the last token's
        hidden state, normalised to length 1.

        Raises: as `generate`; InvalidRequest for `dimensions` that the model's vectors were not trained for.
        """
        asked = self._pooling.pooling(dimensions, pool, normalize)
        prompt_list = listed(prompts)
        names = per_prompt("adapters", adapters, len(prompt_list), str | None)
        jobs = [self._job(prompt, _NO_SAMPLES, name, asked) for prompt, name in zip(prompt_list, names, strict=True)]
        metrics = self._run(jobs, use_tqdm)
        outputs = []
        for job in jobs:
            embedding, error = job.vector()
            outputs.append(
                EmbeddingOutput(
                    prompt=job.prompt,
                    prompt_token_ids=job.request.prompt_token_ids,
                    adapter=job.adapter,
                    embedding=embedding,
                    error=error,
                    metrics=metrics[job.request.request_id],
                )
            )
        return outputs

    def next_token_logprobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        token_ids: Sequence[int],
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[tuple[float, ...]]:
        """Of each prompt the log-probabilities (natural) of `token_ids` as its next token, in their order.

        Raises: as `generate`; RequestFailed when the model's logits were not finite.
        """
        prompt_list = listed(prompts)
        names = per_prompt("adapters", adapters, len(prompt_list), str | None)
        asked = NextToken(token_ids=tuple(token_ids))
        jobs = [self._job(prompt, _NO_SAMPLES, name, asked) for prompt, name in zip(prompt_list, names, strict=True)]
        self._run(jobs, use_tqdm=False)
        found = [job.vector() for job in jobs]
        for _, error in found:
            if error is not None:
                raise RequestFailed(error.message)
        return [logprobs for logprobs, _ in found]

    def prompt_logprobs(
        self, prompts: Prompt | Sequence[Prompt], top: int = 0, adapters: str | Sequence[str | None] | None = None
    ) -> list[tuple[PromptToken, ...]]:
        """Of each prompt what the model says of each of its tokens but the first, with the `top` likeliest instead.

        Raises: as `generate`; RequestFailed when the model's output was not finite.
        """
        prompt_list = listed(prompts)
        names = per_prompt("adapters", adapters, len(prompt_list), str | None)
        asked = PromptScores(top=top)
        jobs = [self._job(prompt, _NO_SAMPLES, name, asked) for prompt, name in zip(prompt_list, names, strict=True)]
        self._run(jobs, use_tqdm=False)
        return [prompt_tokens(job.raw_vector(), asked, job.request.prompt_token_ids) for job in jobs]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
        **template_args: Any,
    ) -> list[GenerationOutput]:
        """Answer one conversation or several, written with the model's chat template. Otherwise as `generate`."""
        several = isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], list | tuple)
        conversations: Any = messages if several else [messages]
        template = self._engine.tokenizer.apply_chat_template
        prompts = [template(conversation, **template_args) for conversation in conversations]
        return self.generate(prompts, params, adapters, use_tqdm)

    def _job(self, prompt: Prompt, params: SamplingParams, adapter: str | None, numbers: Numbers | None = None) -> Job:
        text = prompt if isinstance(prompt, str) else None
        token_ids = self._engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        image = self._image_of(adapter) if adapter is not None else None
        request = Request(
            request_id=f"offline-{next(self._request_ids)}",
            prompt_token_ids=tuple(token_ids),
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(64),
            adapter=image.key if image else None,
            numbers=numbers,
        )
        return Job(request, text, adapter, image)

    def _image_of(self, name: str) -> AdapterImage:
        if name in self._images:
            return self._images[name]
        close = difflib.get_close_matches(name, self._images, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are: {sorted(self._images)}."
        raise AdapterError(f"there is no adapter named {name!r}; {hint} Add it with add_adapter(name, path)")

    def _run(self, jobs: list[Job], use_tqdm: bool) -> dict[str, RequestMetrics]:
        engine = self._engine
        for job in jobs:
            engine.check_request(job.request, job.image)
        waiting = list(reversed(jobs))
        running: dict[str, Job] = {}
        metrics: dict[str, RequestMetrics] = {}
        try:
            with tqdm(total=len(jobs), desc="prompts", disable=not use_tqdm) as progress:
                while engine.has_work:  # what an interrupted call has left is in the queue until the next step
                    self._step(running)
                while waiting or running or engine.has_work:
                    # The engine's queue has a limit; a list of prompts has none.
                    while waiting and len(running) < engine.config.max_queued_requests:
                        job = waiting.pop()
                        engine.add_request(job.request, job.image)
                        self._outputs.open(job.request)
                        running[job.request.request_id] = job
                    self._step(running)
                    metrics.update(engine.take_ended())
                    progress.update(len(jobs) - len(waiting) - len(running) - progress.n)
        except BaseException:
            self._abort(running)
            raise
        return metrics

    def _step(self, running: dict[str, Job]) -> None:
        for update in self._engine.step():
            delta = self._outputs.process(update)
            if delta is not None:
                job = running[delta.request_id]
                job.add(delta)
                if job.done:
                    del running[delta.request_id]
        for request_id, sample_index in self._outputs.take_finishes():
            self._engine.finish(request_id, sample_index, FinishReason.STOP)
        self._engine.adapter_changes()  # their images stay here, to be given with the next request

    def _abort(self, running: dict[str, Job]) -> None:
        """After an interrupt between steps the engine stays usable; its next step frees what these requests hold."""
        for request_id, job in running.items():
            self._outputs.drop(job.request)
            self._engine.abort(request_id)


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = EngineConfig.field_names()
    for name in settings:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}"
            raise TypeError(f"LLM() got an unexpected setting {name!r}; {hint}")
    return settings


def _pack(name: str, folder: Path, engine: Engine) -> AdapterImage:
    """The adapter in `folder` as an image for this engine, keyed by the content of its files."""
    from adapter_store.errors import StoreError
    from adapter_store.image.packing import pack_folder
    from engine.lora.image import AdapterImage, AdapterManifest

    try:
        packed = pack_folder(folder, engine.image_spec.to_dict())
        key = _digest(folder)
    except (StoreError, OSError) as error:
        raise AdapterError(f"adapter {name!r} in {str(folder)!r} cannot be used: {error}") from error
    for notice in packed.manifest.get("notices", ()):
        logger.warning("adapter %s: %s", name, notice)
    manifest = AdapterManifest.from_dict(packed.manifest, engine.image_spec)
    return AdapterImage(key=key, manifest=manifest, data=packed.data)


def _digest(folder: Path) -> str:
    """sha256 (hex) over the names and contents of the two files that make an adapter."""
    digest = hashlib.sha256()
    for file_name in ("adapter_config.json", "adapter_model.safetensors"):
        with (folder / file_name).open("rb") as file:
            digest.update(f"{file_name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
