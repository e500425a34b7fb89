"""
Runs, their attempts, and the plane's identity.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables; the columns are described in `flash.plane.database`."""
    op.create_table("identity", sa.Column("owner", sa.Text, primary_key=True))
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False, index=True),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("not_before_s", sa.Float),
        sa.Column("waiting", sa.Text),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("caller", sa.JSON, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("hint", sa.Text),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("updated_s", sa.Float, nullable=False),
        sa.Column("finished_s", sa.Float),
    )
    op.create_table(
        "attempts",
        sa.Column("fence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False, index=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("offer", sa.JSON, nullable=False),
        sa.Column("ref", sa.JSON),
        sa.Column("stopping", sa.Text),
        sa.Column("outcome", sa.Text),
        sa.Column("exit_code", sa.Integer),
        sa.Column("detail", sa.Text),
        sa.Column("started_s", sa.Float, nullable=False),
        sa.Column("ended_s", sa.Float),
        sa.UniqueConstraint("run", "number"),
        sqlite_autoincrement=True,
    )
