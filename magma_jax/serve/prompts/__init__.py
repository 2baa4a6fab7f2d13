"""From messages to a prompt: wordings, templates, and images from wherever they lie."""
