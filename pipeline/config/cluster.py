"""The resources that a run requests from SLURM, and how its software reaches the nodes."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipeline.config.fields import text_matching
from pipeline.config.section import Section

_Word = Annotated[
    str, text_matching(r"[\w.,:&|*\[\]-]+", "expected letters, digits and . , : & | * [ ] - _ without spaces")
]
"""Text that goes into a batch script as it is, without quotes."""


class EnvironmentConfig(Section):
    """How the software reaches the nodes. By default ranks run the submitting Python from a shared file system."""

    activate: str | None = None
    """Shell lines after which `python` is the right one: "module load cuda; source /shared/venv/bin/activate". None:
    the Python that submits."""
    copy_to_scratch: bool = False
    """Copies the environment to cluster.scratch, once on each node, and runs it from there: thousands of ranks that
    import from a shared file system overload it."""
    container: str | None = None
    """Image in which Apptainer runs the ranks. None: no container."""

    @model_validator(mode="after")
    def _is_one_way(self) -> "EnvironmentConfig":
        if self.container and self.copy_to_scratch:
            raise ValueError("copy_to_scratch has no effect with a container, which has all it needs: remove it")
        return self


class ClusterConfig(Section):
    """The resources that a run requests from SLURM. Only launch/submit.py and the jobs that it submits read them."""

    partition: _Word | None = None
    """SLURM partition. None: the cluster's default."""
    account: _Word | None = None
    """Account that the job is charged to. None: the user's default."""
    qos: _Word | None = None
    """Quality of service. None: the cluster's default."""
    nodes: int = Field(default=1, gt=0)
    """Number of nodes that train."""
    min_nodes: int | None = Field(default=None, gt=0)
    """Minimum number of healthy nodes with which the run continues. The global batch size stays the same. None:
    nodes."""
    spares: int = Field(default=0, ge=0)
    """Number of additional nodes, requested as far as they are free, that replace failed ones."""
    gpus_per_node: int = Field(default=8, ge=0)
    """Number of GPUs of each node. 0: nodes without GPUs."""
    ranks_per_node: int | None = Field(default=None, gt=0)
    """Number of ranks on each node, for nodes without GPUs. None: one for each GPU."""
    cpus_per_rank: int = Field(default=8, gt=0)
    """Number of CPU cores for each rank, which read and decode images."""
    memory_gb: int | None = Field(default=None, gt=0)
    """Memory of each node, in GB. None: the partition's default."""
    time: Annotated[
        str,
        text_matching(
            "([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES"
        ),
    ] = "24:00:00"
    """Time limit of the job, as SLURM writes it: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. A run
    that needs longer saves a checkpoint and is queued again."""
    constraint: _Word | None = None
    """Features that nodes must have, as for sbatch. None: any nodes."""
    exclude: _Word | None = None
    """Nodes that are never used, such as node[07,12-14]. None: all may be used."""
    exclusive: bool = False
    """Requests nodes that no other job shares."""
    options: tuple[Annotated[str, text_matching("--[a-z][^\n]*", "an option of sbatch begins with --")], ...] = ()
    """Further options of sbatch, such as --mail-type=END."""
    grace_s: int = Field(default=180, ge=10)
    """Seconds before the time limit at which SLURM signals the run to save. It must exceed train.preempt_deadline_s."""
    max_restarts: int = Field(default=3, ge=0)
    """Maximum number of crashes, and of time limits reached, without a newer checkpoint in between; one more ends the
    job."""
    environment: EnvironmentConfig = EnvironmentConfig()
    scratch: str | None = None
    """Folder on each node's own disk for the shard cache and the copy of the environment. Variables such as
    $SLURM_TMPDIR or $USER are expanded on the node. None: no such folder."""

    @property
    def ranks(self) -> int:
        """The number of ranks on a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def fewest_nodes(self) -> int:
        """The minimum number of nodes with which the run continues."""
        return self.min_nodes or self.nodes

    @field_validator("time", mode="before")
    @classmethod
    def _accept_minutes(cls, value: Any) -> Any:
        # YAML reads a bare number of minutes as an integer.
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_possible(self) -> "ClusterConfig":
        # Two ranks on a GPU would share its memory; NCCL refuses that.
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} on nodes of {self.gpus_per_node} GPUs: a rank has one GPU; "
                "remove ranks_per_node"
            )
        if not self.ranks:
            raise ValueError("gpus_per_node 0 leaves the number of ranks on a node open: set ranks_per_node")
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        if self.environment.copy_to_scratch and not self.scratch:
            raise ValueError("environment.copy_to_scratch needs scratch: set it to a folder on the nodes' own disks")
        return self
