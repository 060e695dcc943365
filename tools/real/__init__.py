"""SAEs for any Qwen model, in the official layout: texts, residuals, training, release.

Not part of the wheel. Each step is a script of its own, run from the repository's root with one
folder for everything that it makes, and goes on where it was interrupted:

    python -m tools.real.texts   --model MODEL --work WORK --data FOLDER
    python -m tools.real.capture --model MODEL --work WORK --layers 4,10,14,20 --tokens 1500000
    python -m tools.real.train   --work WORK --samples 1500000
    python -m tools.real.release --model MODEL --work WORK
"""
