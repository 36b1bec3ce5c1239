"""Small tokenizers of the kinds that models come with, trained here on a few sentences, and chat templates for them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Answer: yes, no, perhaps. Question: how many are there? There are 12 boats and 4 trips a day.",
    "User: list all files in a folder. Assistant: ls -la path/to/folder",
    "### User:\nhello\n\n### Assistant:\nhello yourself\n\nand good day to you\n\n",
    "system\nYou are a helpful assistant.\nuser\nassistant\n [INST] [/INST] yes yes yes",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]

# As SmolLM2's: a system turn of its own where there is none, content as it is.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same with transformers' own marks of what the assistant writes.
CHATML_WITH_MARKS = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
# As Llama 2's: no generation prompt, a beginning and an end of text around every exchange, no other roles.
LLAMA_2 = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: thoughts are kept in the last answer alone.
REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 3's: content is stripped, an empty line before it.
STRIPPING = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
# Without an end of turn, and with a space at the end of the generation prompt, which fuses with the answer.
WITHOUT_END = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Answer: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *SPECIALS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def byte_level(chat_template: str | None = None, *, pad_token: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """GPT-2's kind, as SmolLM2 and Qwen have: eos is the end of turn, and so is the padding."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(tokenizer, pre_tokenizers.ByteLevel.alphabet()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token=pad_token,
        additional_special_tokens=["<|endoftext|>", "<s>", "</s>"],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def metaspace(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's kind, as Llama 2 has: spaces are ▁, one is put before every text, and so is <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    printable = [chr(code) for code in range(33, 127)] + ["\n"]
    tokenizer = _trained(tokenizer, printable)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def trained_texts(tokenizer: PreTrainedTokenizerFast, input_ids: list[int], labels: list[int]) -> list[str]:
    """What is trained, as text: one string for each run of labels that count."""
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(input_ids, labels, strict=True):
        if label != -100:
            assert label == token
            if not inside:
                runs.append([])
            runs[-1].append(token)
        inside = label != -100
    return [tokenizer.decode(run) for run in runs]
