"""The command `gpt2-jax` as `python -m gpt2_jax`.

Python imports the package before this line, so that Ctrl-C during its first hundredths of a second
ends in Python's own traceback; `gpt2-jax` has no such gap.
"""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main()
