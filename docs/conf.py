"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import maskloss

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "maskloss"
author = "the maskloss authors"
copyright = f"2026, {author}"  # noqa: A001 (Sphinx names it)
version = release = maskloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "languages",
    "llms",
    "mathml",
    "names",
    "summaries",
]
exclude_patterns = [
    "_build",
    "figures",
    "inventories",
    "sg_execution_times.rst",
    "gallery/sg_execution_times.rst",
    "gallery/*.ipynb",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
default_role = "code"

# Scripts that run while the documentation is built, each to a page with its output, its figure and downloads.
sphinx_gallery_conf = {
    "examples_dirs": ["../examples/gallery"],
    "gallery_dirs": ["gallery"],
    "image_scrapers": ("gallery_figures.scrape",),
    "reset_modules": (),
    "capture_repr": (),
    "within_subsection_order": "gallery_figures.Order",
    "abort_on_example_error": True,
    "only_warn_on_example_error": False,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "default_thumb_file": str(Path(__file__).parent / "images" / "point_sampling.png"),
}

# A few names of others, as text, so that a build needs no network: `name kind page`.
intersphinx_mapping = {
    name: (address, f"inventories/{name}.txt")
    for name, address in (
        ("torch", "https://docs.pytorch.org/docs/stable/"),
        ("numpy", "https://numpy.org/doc/stable/"),
        ("matplotlib", "https://matplotlib.org/stable/"),
        ("python", "https://docs.python.org/3/"),
    )
}

# One argument per line and short type names, so that a signature can be read at a glance.
add_module_names = False
# What has no underscore because other modules of the library use it.
_INTERNAL = (
    "begin", "box_costs", "costs", "extra_repr", "focal", "has_box", "instance_losses", "layer_terms", "match",
    "matched_losses", "of_layers", "operands", "target_rows", "tensors", "term",
)  # fmt: skip
autodoc_default_options = {"members": True, "exclude-members": ", ".join(_INTERNAL)}
autodoc_member_order = "bysource"
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_custom_sections = ["Source", ("Attributes", "params_style")]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"maskloss {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
llms_description = (
    "The point-sampled mask loss of Mask2Former and its descendants for PyTorch: matching, classification, and masks "
    "compared at sampled points; with a command that trains on a folder of images."
)
html_favicon = "_static/logo.svg"
html_theme_options = {
    "light_logo": "logo.svg",
    "dark_logo": "logo-dark.svg",
    "sidebar_hide_name": False,
    "light_css_variables": {
        "color-brand-primary": "#0b7285",
        "color-brand-content": "#0b7285",
        "color-brand-visited": "#0b7285",
        "font-stack": "Inter, 'Source Sans 3', 'Segoe UI', system-ui, sans-serif",
        "font-stack--monospace": "'JetBrains Mono', 'Cascadia Code', 'SF Mono', 'DejaVu Sans Mono'",
    },
    "dark_css_variables": {
        "color-brand-primary": "#66d9e8",
        "color-brand-content": "#66d9e8",
        "color-brand-visited": "#66d9e8",
    },
}
