"""Published encoders of texts, alone or beside one of images."""
