"""Sphinx's configuration: `make docs` builds these pages offline, runs their code, and takes every warning as an error.

What a page of one's own needs to know is in CONTRIBUTING.md.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS / "_extensions"))
# The pages speak of these sources, and not of another copy that may be installed.
sys.path.insert(0, str(ROOT))

from gallery_pictures import ExampleArguments, FreshStart  # noqa: E402

import pyro_vfe  # noqa: E402

# What the kernels that run the pages inherit. One thread: the tables are small, and a page shall have the same digits
# on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
# A backend that shows nothing would leave notebooks without figures; kernels choose their own, and the gallery too.
os.environ.pop("MPLBACKEND", None)
# Notices of other packages that no reader of a page can do anything about.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found,ignore:\nArviZ is undergoing:FutureWarning"

project = "pyro_vfe"
author = "The pyro_vfe developers"
project_copyright = author
version = release = pyro_vfe.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_gallery.gen_gallery",
    "site_pages",
]
exclude_patterns = ["_build", "_extensions", "gallery/*.ipynb", "gallery/*.py", "gallery/*.json"]
default_role = "code"
templates_path: list[str] = []

# Pages -------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# The reference -----------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "both"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Groups", "params_style")]

# The gallery -------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "reset_argv": ExampleArguments(str(DOCS / "_build" / "pictures")),
    "reset_modules": ("matplotlib", FreshStart()),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "plot_gallery": True,
    "run_stale_examples": True,
}

# The site ----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "pyro_vfe"
html_favicon = "_static/favicon.svg"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
