"""Alembic migrations of the plane's database; see `flash.plane.database`."""
