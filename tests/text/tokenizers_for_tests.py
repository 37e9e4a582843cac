"""Tokenizers of the kinds that models ship, built here: nothing is downloaded."""

from __future__ import annotations

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
