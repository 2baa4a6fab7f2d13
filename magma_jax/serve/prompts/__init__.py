"""From messages to a prompt: wordings, templates, and pictures from wherever they lie."""
