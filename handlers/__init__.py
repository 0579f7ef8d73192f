"""Built-in handlers, one short file each: use them by name, or copy one and change it.

It is installed as `receiver_handlers`, so that it cannot clash with a user's `handlers`.
"""
