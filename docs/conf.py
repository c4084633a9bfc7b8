"""How the site is built: `sphinx-build -W docs build/docs`, with `pip install ".[docs]"`.

Tutorials are run by the build, and what they print is kept in `build/.jupyter_cache`: unchanged
ones are not run again. The python blocks of all other pages are run by `tests/test_readme.py`, and
the examples of the reference by `tests/test_docstrings.py`.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

# A tutorial computes the same on every machine: on a CPU, and with no hub in reach.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "gpt2_jax"
author = "the authors of gpt2_jax"
copyright = author
release = re.search(
    r'__version__ = "(.*)"', (ROOT / "gpt2_jax" / "__init__.py").read_text(encoding="utf-8")
).group(1)
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "from_source",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "**/jupyter_execute"]
nitpicky = False
# Annotations name classes as the source does: two modules may have one `Summary` each.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

# Docstrings write code as `apply`, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
python_display_short_literal_types = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 150
nb_execution_raise_on_error = True
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "gpt2_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "home_page_in_toc": True,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
