"""A small random Llama with a byte-level tokenizer, as a folder in Hugging Face format."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "Answer: A\nAnswer: B\nAnswer: C\nAnswer: D\n",
    "The following are multiple choice questions",
]


def make_llama(
    folder: Path,
    *,
    max_length: int = 256,
    joins_letters: bool = True,
    seed: int = 0,
    family: str = "Llama",
) -> Path:
    """Saves it; the tokenizer begins texts with <s>; " A" is one token only if letters are joined.

    Weights are far larger than a fresh model's, so that predictions differ from place to place.
    """
    import torch
    import transformers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 if joins_letters else 258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    assert len(wrapped.encode(" A", add_special_tokens=False)) == (1 if joins_letters else 2)
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        **({} if family == "Llama" else {"pad_token_id": wrapped.eos_token_id}),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_writer(
    folder: Path, *, max_length: int = 256, family: str = "Llama", ends: float = 1.3
) -> Path:
    """Saves one that answers in letters, differently to each prompt, and ends some of its answers.

    Rows of its head are zeros for all other bytes, and `ends` times as large for the end of a text.
    """
    import torch
    import transformers

    make_llama(folder, max_length=max_length, family=family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    with torch.no_grad():
        for token, text in enumerate(texts):
            if not (text.isascii() and text.isprintable()) or text == "<s>":
                model.lm_head.weight[token] = 0
        model.lm_head.weight[tokenizer.eos_token_id] *= ends
    model.save_pretrained(folder)
    return folder
