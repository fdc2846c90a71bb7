"""Small tokenizers of every kind that matters: whole words, characters, byte-level BPE, and LLaMA's single
digits.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 =+-*(),.:'\"\n"


def _wrap(tokenizer: Tokenizer, bos: str | None = "<s>", **special: str) -> PreTrainedTokenizerFast:
    if bos is not None:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
        special["bos_token"] = bos
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, split at white space; unknown words are `<unk>`."""
    ids = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<s>", "<unk>", *vocabulary]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, pad_token="<pad>", unk_token="<unk>")


def characters() -> PreTrainedTokenizerFast:
    """One token a character, the space and the line break among them."""
    ids = {token: index for index, token in enumerate(["<pad>", "<s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, pad_token="<pad>", unk_token="<unk>")


def byte_pairs(corpus: Iterable[str], eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, no bos: every word of the corpus becomes one token, with and without its
    space.

    With `eos` it puts `<|endoftext|>` after every text, which no causal prompt wants.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(list(corpus), trainer)
    if eos:
        end = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=end)
    return _wrap(tokenizer, bos=None, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def llama_like() -> PreTrainedTokenizerFast:
    """As LLaMA's: a space becomes `▁` at the front of a word, and every digit is a token of its own."""
    letters = [*"▁\n=+-xy", *"0123456789"]
    ids = {
        token: index
        for index, token in enumerate(["<pad>", "<s>", "<unk>", *letters, "▁=", "▁x", "▁y", "▁+", "▁-"])
    }
    merges = [("▁", token) for token in ("=", "x", "y", "+", "-")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<s>", "<unk>")])
    return _wrap(tokenizer, pad_token="<pad>", unk_token="<unk>")
