"""What a run asks of SLURM."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipeline.config.fields import text_matching
from pipeline.config.section import Section

_Word = Annotated[
    str, text_matching(r"[\w.,:&|*\[\]-]+", "expected letters, digits and . , : & | * [ ] - _ without spaces")
]
"""What goes into a batch script as it is."""


class EnvironmentConfig(Section):
    """How the software gets to the nodes. By itself: the Python that submits, on a file system that they share."""

    activate: str | None = None
    """Shell lines that make `python` the right one: "module load cuda; source /shared/venv/bin/activate"."""
    copy_to_scratch: bool = False
    """Each node copies the environment to cluster.scratch, once, and runs from there: thousands of ranks that import
    from a shared file system bring it to its knees."""
    container: str | None = None
    """Image in which Apptainer runs the ranks."""

    @model_validator(mode="after")
    def _is_one_way(self) -> "EnvironmentConfig":
        if self.container and self.copy_to_scratch:
            raise ValueError("copy_to_scratch has no effect with a container, which has all it needs: leave it out")
        return self


class ClusterConfig(Section):
    """What a run asks of SLURM. Has no effect outside launch/submit.py and the jobs that it submits."""

    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    nodes: int = Field(default=1, gt=0)
    min_nodes: int | None = Field(default=None, gt=0)
    """Go on with as few as this when there are no more. The batches stay what they are. None: nodes."""
    spares: int = Field(default=0, ge=0)
    """Nodes on top, if they are free, to replace those that fail."""
    gpus_per_node: int = Field(default=8, ge=0)
    ranks_per_node: int | None = Field(default=None, gt=0)
    """None: one for each GPU. For nodes without any."""
    cpus_per_rank: int = Field(default=8, gt=0)
    memory_gb: int | None = Field(default=None, gt=0)
    """Of a node. None: what the partition gives."""
    time: Annotated[
        str,
        text_matching(
            "([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES"
        ),
    ] = "24:00:00"
    """Limit for one stretch, as SLURM writes it: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. A run
    that needs longer saves and goes to the end of the queue."""
    constraint: _Word | None = None
    exclude: _Word | None = None
    """Nodes never to be used, such as node[07,12-14]."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    options: tuple[Annotated[str, text_matching("--[a-z][^\n]*", "an option of sbatch begins with --")], ...] = ()
    """Further options of sbatch, such as --mail-type=END."""
    grace_s: int = Field(default=180, ge=10)
    """So long before the time limit a run is told to save. Longer than train.preempt_deadline_s."""
    max_restarts: int = Field(default=3, ge=0)
    """A run stays down that has crashed, or reached its time limit, more often than this without a newer checkpoint."""
    environment: EnvironmentConfig = EnvironmentConfig()
    scratch: str | None = None
    """Folder on each node's own disk, for the shard cache and the copy of the environment. Variables such as
    $SLURM_TMPDIR or $USER mean what they do on the node."""

    @property
    def ranks(self) -> int:
        """On a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def fewest_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_possible(self) -> "ClusterConfig":
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} on nodes of {self.gpus_per_node} GPUs: a rank has one GPU; "
                "leave it out"
            )
        if not self.ranks:
            raise ValueError("gpus_per_node 0 leaves open how many ranks a node has: set ranks_per_node")
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        if self.environment.copy_to_scratch and not self.scratch:
            raise ValueError("environment.copy_to_scratch needs scratch: set it to a folder on the nodes' own disks")
        return self
