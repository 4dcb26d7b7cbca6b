from sqlalchemy import Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The application's own tables."""


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text)


class Org(Base):
    """A table of ours among the application's own: include_object leaves it out."""

    __tablename__ = "orgs"
    __table_args__ = {"schema": "nightowls"}

    org_id: Mapped[str] = mapped_column(Text, primary_key=True)
