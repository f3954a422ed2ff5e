"""Alembic's revisions, in ``versions/``, and its environment; :mod:`cloud.store.migrating` runs them.

A revision is named by the schema that it leads to: "4" makes the tables of schema 3 those of schema 4. It says what it
does in SQL or in Alembic's operations and imports nothing of this package, which will have changed when it runs. To
change a table: change :mod:`cloud.store.schema`, raise ``SCHEMA`` there, and write the revision; the tests compare both
and keep folders of the versions before.
"""
