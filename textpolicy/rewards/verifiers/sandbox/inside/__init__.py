"""The programs that run inside a box. They import the standard library and each other alone."""
