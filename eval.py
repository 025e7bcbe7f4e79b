"""Evaluates a trained model, and has verbs for what else can be done with it: python eval.py [VERB] --workdir=DIR"""

from mefn_jax.commands.eval import main

if __name__ == "__main__":
    main()
