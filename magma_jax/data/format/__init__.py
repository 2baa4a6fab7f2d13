"""The library's own data sets: records, their files, and folders of them."""
