"""From a recipe to what trains."""

from torch import nn

from coterie.models import Decoder, DecoderConfig
from coterie.nn import MoE
from coterie.recipe.parts import NEEDS_K, make_experts, make_router
from coterie.recipe.recipe import Recipe
from coterie.recipe.systems import SYSTEMS, Method
from coterie.train import LossFn, language_model_loss


def build(recipe: Recipe) -> Method:
    """The decoder of a recipe, freshly initialised, with its method's loss and callbacks.

    Raises:
        ValueError: parts that do not fit the sizes, such as more experts per token than there are.

    >>> method = build(Recipe.parse("{model: {layers: 1}, router: {name: top-p, p: 0.4}}"))
    >>> method.model.layers[0].mlp.router.select.p
    0.4
    """
    config = recipe.config
    if recipe.system:
        name, options = _split(recipe.system)
        return SYSTEMS[name](config, **options)
    if not config.num_experts:
        return Method(Decoder(config))
    if not (recipe.router or recipe.score or recipe.experts):
        return Method(Decoder(config))  # its own layers, which a Hugging Face checkpoint can hold
    return Method(Decoder(config, lambda layer: _layer(recipe, config)))


def loss_of(recipe: Recipe, method: Method) -> LossFn:
    """The loss of a recipe's training; a method's own routing loss takes the place of Switch's."""
    if method.routing_loss is None:
        return language_model_loss(**recipe.loss)
    return language_model_loss(**{"balance": 0.0, **recipe.loss}, routing_loss=method.routing_loss)


def _layer(recipe: Recipe, config: DecoderConfig) -> nn.Module:
    bank_name, bank_options = _split(recipe.experts or {"name": "swiglu"})
    bank = make_experts(
        bank_name,
        bank_options,
        num_experts=config.num_experts,
        dim=config.dim,
        hidden=config.expert_hidden,
    )
    router_name, router_options = _split(recipe.router or {"name": "top-k"})
    if router_name in NEEDS_K:
        router_options = {"k": config.top_k, **router_options}
    router = make_router(
        router_name,
        router_options,
        *_split(recipe.score or {"name": "linear"}),
        dim=config.dim,
        num_experts=bank.num_experts,  # type: ignore[arg-type]
        vocab_size=config.vocab_size,
    )
    return MoE(router, bank)  # type: ignore[arg-type]


def _split(named: dict[str, object]) -> tuple[str, dict[str, object]]:
    return str(named["name"]), {key: value for key, value in named.items() if key != "name"}
