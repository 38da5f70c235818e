"""Paths that are URLs: what lies in an object store looks, to all other code, like files of this machine.

A URL has a *mirror*, a local path that only this package makes: ``$SIDREC_STORAGE/in/s3%3A%2F%2Fbucket/data/items.parquet``. From the
mirror's path alone follows the URL, so that mirrors travel to workers as paths do. ``in`` mirrors are read; ``out`` mirrors are
worked in, and whatever ``files`` gives its final name there is put at its URL.

Small files are brought whole. Large ones, by their suffix, stay where they are: their mirror is an empty file, a *stand-in*, and
``open_input`` reads the URL in its place, by ranges.
"""
