"""
What the supervisor needs to hold many runs, to tell their story, and to tell it to others.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns and tables; they are described in `flash.plane.database`."""
    op.add_column("runs", sa.Column("change", sa.Integer, nullable=False, server_default="1"))
    op.add_column("runs", sa.Column("retries_from", sa.Integer, nullable=False, server_default="0"))
    op.add_column(
        "runs", sa.Column("budget_warned", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.create_index("ix_runs_change", "runs", ["change"])
    op.add_column("attempts", sa.Column("boot", sa.Text, nullable=False, server_default=""))
    op.add_column("attempts", sa.Column("boot_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("attempts", sa.Column("step", sa.Integer))
    op.add_column("attempts", sa.Column("then", sa.Text))
    op.add_column(
        "attempts", sa.Column("reported_usd", sa.Float, nullable=False, server_default="0")
    )
    op.create_table(
        "notices",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False, index=True),
        sa.Column("sink", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("not_before_s", sa.Float, index=True),
        sa.Column("delivered_s", sa.Float),
        sqlite_autoincrement=True,
    )
