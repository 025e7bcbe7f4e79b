"""Evaluates a trained model; verbs such as search and report do more: python eval.py [VERB] --workdir=DIR"""

from mefn_jax.commands.eval import main

if __name__ == "__main__":
    main()
