"""How Sphinx makes the pages. `make docs` writes them to build/docs; it needs no network."""

project = "Unison"
copyright = "the authors of Unison, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

html_theme = "sphinx_book_theme"
html_title = "Unison"
html_show_sphinx = False

# Docstrings name code in single backticks; what is described here becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# A list, as of arguments: signatures show the types.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88
myst_heading_anchors = 3
