"""Alembic migrations, a file a step in versions/, chained by `down_revision`; a test compares them to models.py."""
