"""The card of a handmade program's model."""

from __future__ import annotations

from patchkit.zoo.cards import ModelCard
from patchkit.zoo.programs.compile import Shape, compile_program
from patchkit.zoo.programs.language import WORDS, Program
from patchkit.zoo.programs.truth import known_circuit


def program_card(name: str, program: Program, shape: Shape) -> ModelCard:
    """What the model does and which circuit does it. Its accuracy is 1 by construction, and held to by the tests."""
    model = compile_program(program, shape)
    config, known = model.config, known_circuit(program, shape)
    heads = config.num_attention_heads
    return ModelCard(
        name=name,
        architecture=type(model).__name__,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", heads),
        d_model=config.hidden_size,
        d_mlp=getattr(config, "intermediate_size", None) or config.n_inner,
        vocab_size=len(WORDS),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=0,
        task=program.task,
        shows=f"{program.shows}. Its edges: {', '.join(sorted(known.edges))}",
        does_not_show="anything about trained models: nothing is learned or superposed in it",
        prompts_per_cell=200,
        accuracy={"prompts": {"all": 1.0}},
    )
