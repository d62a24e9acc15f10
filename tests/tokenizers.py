"""Small tokenizers of the kinds that models have, made here with the tokenizers library."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = ["the user said hello to you <a> |b| end_of_turn 1+1=2 ▁ s eot id im_end\n\n" * 3]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
UNIGRAM = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDPIECE = "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP]{% endfor %}"
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


def make_tokenizer(kind: str) -> TokenizerWrapper:
    """Return a tokenizer of a kind in `KINDS`."""
    backend, template, options = KINDS[kind]()
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    inner.chat_template = template
    return TokenizerWrapper(inner)


def save_tokenizer(kind: str, folder: Path) -> None:
    """Write the files of a tokenizer of a kind in `KINDS`."""
    make_tokenizer(kind).save_pretrained(str(folder))


def _bytes(template: str, stop: str, tokens: list[AddedToken | str], **options: Any) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([t for t in tokens if isinstance(t, str) or t.special])
    backend.add_tokens([t for t in tokens if not isinstance(t, str) and not t.special])
    return backend, template, {"eos_token": stop} | options


def _llama3() -> Any:
    names = ["begin_of_text", "start_header_id", "end_header_id", "eot_id"]
    tokens = [f"<|{name}|>" for name in names]
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(240)]
    backend, *rest = _bytes(LLAMA3, "<|eot_id|>", [*tokens, *reserved])
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return backend, *rest


def _stripping() -> Any:
    tokens = [
        AddedToken("<|im_start|>", lstrip=True, special=True),
        AddedToken("<|im_end|>", rstrip=True, special=True),
        AddedToken("<|pad|>", normalized=True, special=True),
        AddedToken("<word>", single_word=True, special=True),
        AddedToken("<tool_call>", special=False),
    ]
    return _bytes(CHATML, "<|im_end|>", tokens, pad_token="<|pad|>")


def _unmarked() -> Any:
    """A tokenizer whose tokens of roles are not marked as special."""
    tokens = [
        AddedToken("<|User|>", special=False, normalized=True),
        AddedToken("<|Assistant|>", special=False, normalized=True),
        AddedToken("<|end|>", special=True),
    ]
    return _bytes(DEEPSEEK, "<|end|>", tokens)


def _unigram() -> Any:
    """Sentencepiece's Unigram, whose pieces hold </s>, so that plain text can become it."""
    letters = sorted({*"".join(CORPUS), *"</s>|[]:_abcdefghijklmnopqrstuvwxyz"} - {" ", "\n"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -5.0) for letter in letters if letter != "▁"]
    pieces += [("▁hello", -3.0), ("user", -3.0), ("<s", -3.5)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend, UNIGRAM, {"eos_token": "</s>", "unk_token": "<unk>"}


def _byte_fallback() -> Any:
    """Llama 2: BPE with byte fallback, a prepended space, and <s> written by the tokenizer."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/[]|_1+=2"))
    vocab = {name: number for number, name in enumerate([*names, *letters, "he", "▁s", "</"])}
    merges = [("h", "e"), ("▁", "s"), ("<", "/")]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend, LLAMA2, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def _wordpiece() -> Any:
    """An uncased BERT: [sep] in small letters is lowered text, and [SEP] is the token."""
    names = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz[]<>|/_0123456789+=:"]
    names += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["user", "hello"]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return backend, WORDPIECE, {"eos_token": "[SEP]", "unk_token": "[UNK]"}


KINDS = {
    "chatml": lambda: _bytes(CHATML, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "llama3": _llama3,
    "stripping": _stripping,
    "unmarked": _unmarked,
    "unigram": _unigram,
    "byte fallback": _byte_fallback,
    "wordpiece": _wordpiece,
}
