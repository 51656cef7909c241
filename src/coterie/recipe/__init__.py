"""Recipes: language models put together from named parts, trained on one's own text, and compared.

A recipe is a YAML file, or options of the command line, or both (options win):

    text: novels/                    # a file, a folder, or a list of them
    model: {dim: 96, layers: 3, num_experts: 8, expert_hidden: 192}
    router: {name: top-p, p: 0.4}    # or a whole system: `system: {name: moe-plus-plus, tau: 0.5}`
    experts: swiglu
    loss: {balance: 0.01, entropy: 0.01}
    train: {steps: 1000, lr: 4e-3}

What a section may hold are the arguments of the part that it names; `coterie train parts` lists them.
"""

from coterie.recipe.build import build
from coterie.recipe.compare import compare_recipes
from coterie.recipe.recipe import Recipe, Training
from coterie.recipe.systems import Method
from coterie.recipe.train import load_trained, train_lm

__all__ = ["Method", "Recipe", "Training", "build", "compare_recipes", "load_trained", "train_lm"]
