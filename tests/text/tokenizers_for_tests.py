"""Tokenizers of the kinds that models ship, built here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.text.tokenizer import Tokenizer as ChorusTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "héllo wörld, 你好 世界 🙂🙃",
    "a b  c   d\n\te",
    "ababab abcabc",
]
SPECIAL = ["<pad>", "<s>", "</s>"]


def wrap(tokenizer: Tokenizer) -> ChorusTokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    fast.add_tokens([AddedToken("<plain added>", normalized=False), AddedToken("über", normalized=False)])
    return ChorusTokenizer(fast)


def byte_level() -> ChorusTokenizer:
    """As GPT-2, Llama 3, Qwen: merges may cut characters anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return wrap(tokenizer)


def metaspace() -> ChorusTokenizer:
    """As T5 and XLM-R: a space is written as a leading mark, the first one is dropped in decoding."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return wrap(tokenizer)


def byte_fallback(strip: bool = True) -> ChorusTokenizer:
    """As Llama 2 (`strip`) and Gemma: characters outside the vocabulary are written as `<0x..>` tokens."""
    words = ["▁", "▁▁", "▁he", "llo", "▁wor", "ld", "a", "▁a", "b", "é", "你", "\n", "▁�"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *[f"<0x{b:02X}>" for b in range(256)], *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return wrap(tokenizer)


def word_piece() -> ChorusTokenizer:
    """As BERT: continuation marks, and spaces before punctuation removed in decoding."""
    words = ["[UNK]", "he", "##llo", "world", "##s", ".", ",", "!", "don", "'", "t", "##a"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return wrap(tokenizer)


def byte_level_stripped() -> ChorusTokenizer:
    """A byte-level decoder that is only the first of two."""
    tokenizer = byte_level()
    tokenizer.backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def metaspace_scheme(scheme: str) -> ChorusTokenizer:
    tokenizer = metaspace()
    tokenizer.backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def metaspace_with_bytes() -> ChorusTokenizer:
    """As T5 of transformers 5."""
    tokenizer = byte_fallback()
    parts = [decoders.Metaspace(prepend_scheme="always"), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend.decoder = decoders.Sequence(parts)
    return tokenizer


def two_stripped() -> ChorusTokenizer:
    tokenizer = byte_fallback()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    tokenizer.backend.decoder = decoders.Sequence(parts)
    return tokenizer


def word_piece_as_written() -> ChorusTokenizer:
    tokenizer = word_piece()
    tokenizer.backend.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def suffixed() -> ChorusTokenizer:
    """As OpenAI GPT: the end of a word is marked, and reads as a space unless it is the last."""
    words = ["<unk>", "he", "llo</w>", "wor", "ld</w>", "a</w>", "b", ".</w>", ",</w>", "</w>"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrap(tokenizer)


def ctc() -> ChorusTokenizer:
    """Repetitions fall together, a bar is a space."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", "|", *"abc'nt.", "<blank>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.CTC(pad_token="<blank>", word_delimiter_token="|")
    return wrap(tokenizer)


def words(decoder: decoders.Decoder | None = None) -> ChorusTokenizer:
    """Whole words; without a decoder they are put together with spaces."""
    names = ["<unk>", "hello", "world", ".", ",", "!", "?", "'", "s", "m", "ve", "n't", "'s", "n", "a", "  "]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *names])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return wrap(tokenizer)


def cleaned(tokenizer: ChorusTokenizer) -> ChorusTokenizer:
    """The same, asking for `clean_up_tokenization_spaces`."""
    hf_tokenizer = tokenizer._hf
    hf_tokenizer.clean_up_tokenization_spaces = True
    return ChorusTokenizer(hf_tokenizer)


KINDS: dict[str, Callable[[], ChorusTokenizer]] = {
    "byte_level": byte_level,
    "byte_level_stripped": byte_level_stripped,
    "byte_level_cleaned": lambda: cleaned(byte_level()),  # transformers does not clean up BPE
    "metaspace": metaspace,
    "metaspace_first": lambda: metaspace_scheme("first"),
    "metaspace_never": lambda: metaspace_scheme("never"),
    "metaspace_cleaned": lambda: cleaned(metaspace()),
    "metaspace_with_bytes": metaspace_with_bytes,
    "llama2": byte_fallback,
    "gemma": lambda: byte_fallback(strip=False),
    "two_stripped": two_stripped,
    "word_piece": word_piece,
    "word_piece_as_written": word_piece_as_written,
    "word_piece_cleaned": lambda: cleaned(word_piece_as_written()),
    "suffixed": suffixed,
    "ctc": ctc,
    "words": words,
    "words_cleaned": lambda: cleaned(words()),
    "words_fused": lambda: words(decoders.Fuse()),
}
