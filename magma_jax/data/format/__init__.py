"""The library's own datasets: records, their files, and folders of them."""
