"""
Deployments, the keys of the gateway, and what was used with them.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables; the columns are described in `flash.plane.database`."""
    op.create_table(
        "deployments",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False, index=True),
        sa.Column("step", sa.Integer),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("model", sa.JSON, nullable=False),
        sa.Column("backend", sa.Text, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("thinking", sa.Boolean, nullable=False),
        sa.Column("stop", sa.JSON, nullable=False),
        sa.Column("allow_drift", sa.Boolean, nullable=False),
        sa.Column("state", sa.Text, nullable=False, index=True),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("hint", sa.Text),
        sa.Column("report", sa.JSON),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("updated_s", sa.Float, nullable=False),
    )
    op.create_table(
        "gateway_keys",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("revoked_s", sa.Float),
    )
    op.create_table(
        "usage",
        sa.Column("request", sa.Text, primary_key=True),
        sa.Column("time_s", sa.Float, nullable=False, index=True),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("cached_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
    )
