"""Where a sweep runs, and keeps what it computes."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.section import Section


class StoreLimits(Section):
    """The shared store, and its limits."""

    remote: str | None = Field(
        default=None,
        description="Object storage for the store, such as s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, with ?region=... "
        "or ?endpoint_override=HOST:PORT&scheme=https; null: the folder `store` below `storage`. Keys come from the "
        "environment or the machine. Each node keeps copies in $ORCHESTRATOR_CACHE.",
    )
    max_gb: float | None = Field(
        default=None, gt=0, description="`store gc` shrinks the store to this; null: no limit."
    )
    min_free_gb: float = Field(default=0.5, ge=0, description="A stage is refused where it would leave less free disk.")
    pixels_gb: float = Field(default=4.0, ge=0, description="Rendered views are stored if they take at most this much.")

    @field_validator("remote")
    @classmethod
    def _an_address_without_secrets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, there, rest = value.partition("://")
        if not there or scheme not in ("s3", "gs", "gcs", "file") or not rest.strip("/"):
            raise ValueError("remote is no address of the form s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH")
        place, _, query = rest.partition("?")
        user, at, _ = place.partition("/")[0].rpartition("@")
        if (at and user != "anonymous") or any(word in query.lower() for word in ("secret", "password", "token")):
            raise ValueError(
                "remote holds a key, which would be copied into the sweep's folder: take it out, and give it in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or by the "
                "machine's role"
            )
        if ".." in place.split("/"):
            raise ValueError("remote leads out of its bucket with '..'")
        return value


class NodeType(Section):
    """Nodes of one kind."""

    max: int = Field(ge=0, description="At most this many at a time.")
    resources: dict[str, float] = Field(description="What Ray sees of one: CPU, GPU, memory (bytes), own resources.")


class Cluster(Section):
    """The cluster that a sweep runs on; a machine alone needs none of this."""

    file: str | None = Field(
        default=None,
        description="The file that the cluster was made from (Ray's launcher, a RayCluster or RayJob): its limits say "
        "how far a sweep may make it grow. Read when the sweep starts; then `nodes` holds them.",
    )
    nodes: dict[str, NodeType] = Field(default_factory=dict, description="Node types by name; instead of `file`.")
    prices: dict[str, float] = Field(
        default_factory=dict,
        description="Price of an hour of a node, by node type; `orchestrator cost` reckons by them.",
    )

    @field_validator("prices")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        for name, price in value.items():
            if price < 0:
                raise ValueError(f"the price of {name!r} is {price:g}; a price is 0 or more")
        return value

    @model_validator(mode="after")
    def _prices_of_something(self) -> Cluster:
        if self.prices and self.file is None and not self.nodes:
            raise ValueError("prices are for node types, and there are none; give file or nodes")
        return self
