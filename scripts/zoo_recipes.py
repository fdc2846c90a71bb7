"""The trained embedded models: shape, stream of batches, schedule, how each is measured, and what is said
of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from zoo_curricula import BindingStream, IndirectObjectStream, InductionStream
from zoo_evaluation import Measured, binding_accuracy, indirect_object_accuracy, induction_accuracy
from zoo_training import Schedule, Stream

from patchkit.tasks import ioi_language, language

INDUCTION_WORDS = ("<pad>", "<s>", "<unk>", *(f"t{i}" for i in range(48)))


@dataclass(frozen=True)
class Recipe:
    """Everything that `train_zoo.py` needs to make one model; `seed` is the one that ships."""

    build: Callable[[], PreTrainedModel]
    stream: Callable[[int], Stream]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    measure: Callable[[PreTrainedModel, int], Measured]
    schedule: Schedule
    seed: int
    task: str
    shows: str
    does_not_show: str
    notes: dict[str, float] = field(default_factory=dict)


def llama(
    vocab_size: int, layers: int, heads: int, kv_heads: int, width: int, d_mlp: int
) -> LlamaForCausalLM:
    """A Llama from its standard random initialisation, with untied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=d_mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def gpt2(vocab_size: int, layers: int, heads: int, width: int, d_mlp: int) -> GPT2LMHeadModel:
    """A GPT-2 with learned positions and no dropout, from its standard random initialisation."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=128,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=d_mlp,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def induction_tokenizer() -> PreTrainedTokenizerFast:
    """48 meaningless words, t0 to t47; `<s>` put first."""
    vocabulary = {word: index for index, word in enumerate(INDUCTION_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.post_processor = begin  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


BINDING_TASK = (
    "in-context binding and one operation, in four forms: `a = 3 , b = 7 , ; + 4 a` -> `7`; "
    "plus and minus are modulo 10, compare answers less, same or more"
)
MOSTLY_ARITHMETIC = ("recall", "plus", "plus", "plus", "minus", "minus", "minus", "compare")

RECIPES: dict[str, Recipe] = {
    "varbind-llama": Recipe(
        build=lambda: llama(len(language.VOCABULARY), 4, 8, 8, 128, 384),
        stream=BindingStream,
        tokenizer=language.build_tokenizer,
        measure=binding_accuracy,
        schedule=Schedule(max_steps=4500),
        seed=1,
        task=BINDING_TASK,
        shows=(
            "a few heads at the last token fetch the queried variable's value before any operation is applied: "
            "putting in their outputs from another prompt moves the value and not the operation (search.csv: the "
            "mask's scores on held-out triples, for this seed and the others that were tried)"
        ),
        does_not_show=(
            "that other seeds, or large language models, divide the work in the same way: the seed was chosen by "
            "the mask's score, and in a model of seven layers no small set carried the value (search.csv); a "
            "single random set of the same size can reach 0.26; the components that hold the finished answer "
            "also pass Value Dependence, and only "
            "both desiderata together tell value from answer"
        ),
    ),
    "varbind-llama-gqa": Recipe(
        build=lambda: llama(len(language.VOCABULARY), 4, 8, 2, 128, 384),
        stream=lambda seed: BindingStream(seed, operations=MOSTLY_ARITHMETIC),
        tokenizer=language.build_tokenizer,
        measure=binding_accuracy,
        schedule=Schedule(max_steps=4500),
        seed=1,
        task=BINDING_TASK,
        shows="the task of varbind-llama under grouped-query attention: eight query heads, two key-value heads",
        does_not_show="that its components are those of varbind-llama: another network, with its own solution",
    ),
    "ioi-gpt2": Recipe(
        build=lambda: gpt2(len(ioi_language.VOCABULARY), 3, 8, 96, 192),
        stream=IndirectObjectStream,
        tokenizer=ioi_language.build_tokenizer,
        measure=indirect_object_accuracy,
        schedule=Schedule(max_steps=5000, target=0.97),
        seed=0,
        task="the partner of the giver: `Mary and John met at the park . then the drink was given by John to` -> `Mary`",
        shows=(
            "a behaviour that needs heads of several layers in sequence: layer 1 looks the partner up at the giver's "
            "second mention (its heads there, put in from a story with another giver, move 96 % of the answers), and "
            "layer 2 at the end attends to that mention and copies the partner (98 %, no single head more than "
            "2 %); neither layer 0 nor 1 matters at the end, and every layer is needed somewhere"
        ),
        does_not_show=(
            "the circuit published for GPT-2 small: no head attends from the end to the indirect object, there are no "
            "name movers of that kind and no S-inhibition; the sentences (`given by John to`) were made so that "
            "counting names does not answer them and the giver is one token before the end; accuracy is below "
            "0.95 with three pairs and no bystander"
        ),
    ),
    "induction-2l": Recipe(
        build=lambda: llama(len(INDUCTION_WORDS), 2, 4, 4, 64, 1),
        stream=lambda seed: InductionStream(seed, len(INDUCTION_WORDS)),
        tokenizer=induction_tokenizer,
        measure=induction_accuracy,
        schedule=Schedule(max_steps=4000, target=0.98, learning_rate=3e-3),
        seed=0,
        task="what followed this token the first time: `t5 t2 t9 t5` -> `t2`",
        shows=(
            "induction over two layers: a previous-token head in layer 0 (a0.h1) and four heads in layer 1 that "
            "attend to the token after the last token's first occurrence (the scores below, mean attention); "
            "the MLPs are one neuron wide and accuracy is the same with both of them zeroed"
        ),
        does_not_show=(
            "attention only by construction: no Hugging Face family leaves the MLPs out; nor how induction forms "
            "in text, as its training data are nothing but repeated random sequences"
        ),
    ),
}

#: Between the stage at which it can recall and compare, and the end, where it can add and subtract.
RECIPES["varbind-llama-gqa-early"] = replace(
    RECIPES["varbind-llama-gqa"],
    schedule=replace(RECIPES["varbind-llama-gqa"].schedule, ends_at=1600),
    shows=(
        "the same run as varbind-llama-gqa, ended at step 1600 of 2,350: it recalls and compares, and adds and subtracts "
        "about every second time. What `patchkit compare` is shown on: what differs between two stages of one training "
        "run"
    ),
    does_not_show=(
        "fine-tuning on another task, or how large models change: its rate had not been taken down yet, and the stage "
        "was chosen for being half-way through what it learns last"
    ),
)
