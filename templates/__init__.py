"""Jinja templates of the kernels, one `<family>.py.j2` a family; ships as nsa_autotune.templates."""
